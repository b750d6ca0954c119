"""Where a factor per channel can move: from what makes an input into the linear layers that read it.

A pair is a source (a norm, or rows of a linear layer) and the linear layers that read what it makes. Multiplying the
one and dividing the others by the same factors changes nothing, if they are a pair. That is found out on the layer
itself. Proposed: factors at what a source makes appear in what linear layers read. Accepted: moving random factors
leaves all that the layer returns, and leaves behind, unchanged. No family is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tasks.model.linears import Origins
from tasks.model.products import Product, Products, Readers, Slice

FOUND = 1e-3  # relative to the largest number that a linear layer reads; the factors lie between 0.5 and 2
PROVEN = 1e-4  # relative to the largest number of a tensor; rounding in float32 moves it by about 1e-6
POWERS = (1, 2)  # an activation may square what it reads
DERIVED = 1e-4  # relative to the sum of the sizes of what a derivative adds up
TOGETHER = 64  # channels whose derivatives are computed at once
NEAR = 8  # factors to either side among which a channel's is looked for

Run = Callable[[], list[Tensor]]  # a pass through the layer, and all that it makes


@dataclass
class Heard:
    """What reads one input in a pass: x, and the matrices in memory that are multiplied with it, in order."""

    x: Tensor
    slices: list[Slice] = field(default_factory=list)


@dataclass
class Pair:
    """A source and what reads what it makes.

    source: a norm, or a linear layer on disk, by name. offset: of a norm, which makes (offset + weight) times what it
    has normalized. rows: for each channel of the input, the row of the source that it follows; power: how, 2: by its
    square. readers: the linear layers on disk, by name. problem: why it is not used; empty if it is. stored: a
    norm's name on disk; source is that in memory.
    """

    source: str
    rows: list[int]
    readers: list[str]
    offset: float | None = None
    power: int = 1
    problem: str = ""
    moved: Slice | None = None  # the source's matrix in memory, and its rows there
    places: Tensor | None = None
    slices: list[Slice] = field(default_factory=list)  # of the readers
    stored: str | None = None

    @property
    def grouped(self) -> bool:
        """Whether several channels follow one row of the source, as with grouped queries."""
        return len(set(self.rows)) < len(self.rows)

    @property
    def name(self) -> str:
        """The source's name on disk, where it has one."""
        return self.stored or self.source


def listen(layer: nn.Module, run: Callable[[], Any]) -> list[Heard]:
    """The distinct inputs of a pass through the layer, in the order of their first readers."""
    found: dict[Slice, Heard] = {}
    readers = Readers()

    def hear(product: Product) -> None:
        first = readers.first(product.x, product.weight)
        one = found.setdefault(first, Heard(product.x.detach().clone()))
        if product.weight not in one.slices:
            one.slices.append(product.weight)

    with Products(layer, hear), torch.no_grad():
        run()
    return list(found.values())


def norms(layer: nn.Module) -> dict[str, Any]:
    """Modules whose own parameters are all vectors, a weight among them, by name."""
    found = {}
    for name, module in layer.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if (
            own
            and all(p.dim() == 1 for p in own.values())
            and isinstance(getattr(module, "weight", None), nn.Parameter)
        ):
            found[name] = module
    return found


def propose(layer: nn.Module, run: Run, origins: Origins) -> list[Pair]:
    """Sources whose factors appear in what linear layers read."""
    draw = torch.Generator().manual_seed(0)
    before = listen(layer, run)
    found: list[Pair] = []
    for name, module in norms(layer).items():
        size = module.weight.numel()
        factors = [_factors(size, draw) for _ in range(2)]
        passes = [_with_norm(layer, run, module, factor) for factor in factors]
        pair = _of_norm(name, size, before, passes, factors, origins)
        if pair:
            found.append(pair)
    found += _of_linears(layer, run, origins)
    return _one_source(found)


def prove(layer: nn.Module, run: Run, pairs: list[Pair]) -> None:
    """Set `problem` of the pairs that do not leave all that the layer makes unchanged. Pairs whose sources are in one
    parameter, such as those of all experts, are tried together."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = run()
        together: dict[str, list[Pair]] = {}
        for pair in (one for one in pairs if not one.problem):
            together.setdefault(pair.source if pair.moved is None else pair.moved.parameter, []).append(pair)
        for same in together.values():
            with _moved(layer, same, draw):
                after = run()
            far = [_distance(a, b) for a, b in zip(before, after, strict=True)]
            if not max(far, default=0.0) <= PROVEN:
                for pair in same:
                    pair.problem = (
                        f"moving factors changes what the layer makes (by {max(far):.2g} of the largest number)"
                    )


def find_offsets(layer: nn.Module, run: Run, pairs: list[Pair]) -> None:
    """Set the offset of the pairs whose source is a norm: 0, or 1 as in Gemma. Found by trying the weights 0 and 1."""
    for pair in (one for one in pairs if one.moved is None):
        module: Any = layer.get_submodule(pair.source)
        with torch.no_grad():
            args, kwargs = _called_with(module, run)
            with _kept(module):
                if isinstance(getattr(module, "bias", None), Tensor):
                    module.bias.zero_()
                made = []
                for value in (0.0, 1.0):
                    module.weight.fill_(value)
                    made.append(module(*args, **kwargs))
        offset = (made[0] / (made[1] - made[0])).float().nanmedian().item()
        pair.offset = round(offset, 3)
        if pair.offset not in (0.0, 1.0):
            pair.problem = f"the norm's weight acts in an unknown way (offset {offset:.3g})"


# ---- proposing


def _called_with(module: nn.Module, run: Run) -> tuple[Any, Any]:
    """What the module is called with first in a pass."""
    calls: list[tuple[Any, Any]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    run()
    hook.remove()
    return calls[0]


def _factors(count: int, draw: torch.Generator) -> Tensor:
    """Distinct random factors between 0.5 and 2."""
    return 2 ** (torch.rand(count, generator=draw) * 2 - 1)


def _with_norm(layer: nn.Module, run: Run, module: nn.Module, factor: Tensor) -> list[Heard]:
    def change(_: Any, __: Any, made: Any) -> Any:
        fits = isinstance(made, Tensor) and made.shape[-1] == len(factor)
        return made * factor.to(made) if fits else made

    hook = module.register_forward_hook(change)
    try:
        return listen(layer, run)
    finally:
        hook.remove()


def _matched(x: Tensor, changed: list[Tensor], factors: list[Tensor], power: int) -> Tensor | None:
    """For each channel of x the row whose factors it follows in both passes; None unless all do."""
    x = x.flatten(0, -2)
    largest = x.abs().amax()
    if not largest:
        return None
    others = [one.flatten(0, -2) for one in changed]
    strongest = x.abs().argmax(0)
    at = torch.arange(x.shape[1], device=x.device)
    base = x[strongest, at]
    ratios = [(one[strongest, at] / base) for one in others]
    wanted = [factor.to(x) ** power for factor in factors]
    order = wanted[0].argsort()
    spot = torch.searchsorted(wanted[0][order], ratios[0].contiguous())
    near = (spot[:, None] + torch.arange(-NEAR, NEAR, device=x.device)).clamp(0, len(order) - 1)
    rows = order[near]
    miss = sum((want[rows] - ratio[:, None]).abs() for want, ratio in zip(wanted, ratios, strict=True))
    assert isinstance(miss, Tensor)
    chosen = rows.gather(1, miss.argmin(1, keepdim=True)).flatten()
    chosen[base == 0] = -1  # a channel that is 0 for all tokens tells nothing
    if bool((chosen < 0).any()):
        return None
    for one, want in zip(others, wanted, strict=True):
        if not bool(((one - x * want[chosen]).abs().amax() <= FOUND * largest).item()):
            return None
    return chosen.cpu()


def _by_first(heard: list[Heard]) -> dict[Slice, Heard]:
    return {one.slices[0]: one for one in heard}


def _changed(one: Heard, passes: list[list[Heard]]) -> list[Tensor] | None:
    """The same input in the two passes with factors; None if it is not there, has other tokens, or is unchanged."""
    found = []
    for each in map(_by_first, passes):
        other = each.get(one.slices[0])
        if other is None or other.x.shape != one.x.shape or torch.equal(other.x, one.x):
            return None
        found.append(other.x)
    return found


def _of_norm(
    name: str, size: int, before: list[Heard], passes: list[list[Heard]], factors: list[Tensor], origins: Origins
) -> Pair | None:
    readers: list[Slice] = []
    for one in before:
        if one.x.shape[-1] != size or (changed := _changed(one, passes)) is None:
            continue
        rows = _matched(one.x, changed, factors, 1)
        if rows is not None and torch.equal(rows, torch.arange(size)):
            readers += one.slices
    if not readers:
        return None
    return Pair(name, list(range(size)), _on_disk(readers, origins), offset=0.0, slices=readers)


def _of_linears(layer: nn.Module, run: Run, origins: Origins) -> Iterator[Pair]:
    """By derivatives: with a factor s for each row of a linear layer, channel c of what another reads follows row j if
    dx_c / ds_j = p x_c at s = 1, for p of `POWERS`. Other rows on which the channel depends as well, as on those of a
    gate in one matrix with what it gates, do not disturb that. Of a stack, one matrix tells for all."""
    scales: dict[Slice, Tensor] = {}
    found: dict[Slice, tuple[Tensor, list[Slice]]] = {}
    readers = Readers()

    def hear(product: Product) -> Tensor:
        x, own = product.x, product.weight
        first = readers.first(x, own)
        found.setdefault(first, (x, []))[1].append(own)
        if own not in scales:
            scales[own] = torch.ones(own.shape[0], device=x.device, requires_grad=True)
        return product.again(x.detach()) * scales[own]  # cut before, so that only what lies between is derived

    with Products(layer, hear), torch.enable_grad():
        run()
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    known: set[tuple[str, ...]] = set()
    for x, slices in found.values():
        kind = tuple(one.parameter for one in slices)
        if not x.requires_grad or kind in known:
            continue
        known.add(kind)
        count = slices[0].stack(sizes[kind[0]])
        for parameter, power, rows in _followed(x, scales):
            source = next(one for one in scales if one.parameter == parameter)
            if count == 1 and source.stack(sizes[parameter]) == 1:
                yield from _linear_pair(source, rows, power, slices, origins)
            elif count == source.stack(sizes[parameter]):  # each expert's own
                for place in range(count):
                    yield from _linear_pair(source.at(place), rows, power, [one.at(place) for one in slices], origins)


def _followed(x: Tensor, scales: Mapping[Slice, Tensor]) -> Iterator[tuple[str, int, Tensor]]:
    """The parameters of which every channel of x follows a row, how, and for each channel the row."""
    flat = x.flatten(0, -2)
    draw = torch.Generator().manual_seed(2)
    weights = torch.randn(2, len(flat), generator=draw).to(flat)  # two, for in one a row may fit by chance
    sums = weights @ flat
    large = (weights.abs() @ flat.detach().abs()).clamp(min=1e-12)
    rows: dict[tuple[Slice, int], list[Tensor]] = {(one, power): [] for one in scales for power in POWERS}
    for channels in _blocks(flat.shape[1]):
        sources = list(dict.fromkeys(source for source, _ in rows))
        slopes = [_slopes(sums[number], channels, [scales[one] for one in sources]) for number in range(2)]
        for (source, power), own in list(rows.items()):
            fit = None
            for number in range(2):
                slope = slopes[number][sources.index(source)]
                if slope is not None:
                    far = (slope - power * sums[number, channels, None].detach()).abs()
                    near = far < DERIVED * large[number, channels, None]
                    fit = near if fit is None else fit & near
            if fit is None or not bool(fit.any(1).all()):
                del rows[source, power]
            else:
                own.append(fit.int().argmax(1))
        if not rows:
            return
    for (source, power), parts in rows.items():
        yield source.parameter, power, torch.cat(parts).cpu()


def _blocks(channels: int) -> Iterator[slice]:
    """The channels, one first: mostly it follows no row, and the others need not be asked."""
    yield slice(0, 1)
    for start in range(1, channels, TOGETHER):
        yield slice(start, min(start + TOGETHER, channels))


def _slopes(sums: Tensor, channels: slice, scales: list[Tensor]) -> list[Tensor | None]:
    """The derivatives of some channels' sums with respect to each row's factor: [channels, rows] for each of `scales`,
    None where a sum does not depend on them."""
    asked = sums[channels]
    if len(asked) == 1:
        found = torch.autograd.grad(asked[0], scales, retain_graph=True, allow_unused=True)
        return [None if one is None else one[None] for one in found]
    each = torch.eye(len(asked), dtype=asked.dtype, device=asked.device)
    try:
        many = torch.autograd.grad(asked, scales, each, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:  # an operation without a batched derivative
        rows = [torch.autograd.grad(one, scales, retain_graph=True, allow_unused=True) for one in asked]
        parts = zip(*rows, strict=True)
        return [None if any(one is None for one in part) else torch.stack(part) for part in parts]
    return list(many)


def _linear_pair(source: Slice, rows: Tensor, power: int, slices: list[Slice], origins: Origins) -> Iterator[Pair]:
    for piece in origins.pieces(source):
        place = dict(zip(piece.places.tolist(), piece.rows.tolist(), strict=True))
        if all(row in place for row in rows.tolist()):
            on_disk = [place[row] for row in rows.tolist()]
            readers = _on_disk(slices, origins)
            yield Pair(piece.linear.name, on_disk, readers, None, power, "", source, rows, list(slices))


def _on_disk(slices: list[Slice], origins: Origins) -> list[str]:
    return list(dict.fromkeys(piece.linear.name for one in slices for piece in origins.pieces(one)))


def _one_source(pairs: list[Pair]) -> list[Pair]:
    """Norms first. An input that follows several linear layers, as that of a gated linear unit without a curve, is that
    of the last."""
    last = {tuple(pair.readers): pair for pair in pairs if pair.moved is not None}
    return [pair for pair in pairs if pair.moved is None] + list(last.values())


# ---- moving factors


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Put back the module's parameters after the body."""
    kept = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.data.copy_(kept[name])


@contextmanager
def _moved(layer: nn.Module, pairs: list[Pair], draw: torch.Generator) -> Iterator[None]:
    """Move random factors from the sources to the readers for the duration of the body."""
    parameters = dict(layer.named_parameters())
    touched = {name for pair in pairs for name in _touched(pair, parameters)}
    kept = {name: parameters[name].detach().clone() for name in touched}
    try:
        for pair in pairs:
            _move(pair, parameters, draw)
        yield
    finally:
        for name, tensor in kept.items():
            parameters[name].data.copy_(tensor)


def _touched(pair: Pair, parameters: Mapping[str, Tensor]) -> list[str]:
    names = [f"{pair.source}.weight", f"{pair.source}.bias"]
    if pair.moved is not None:
        names = [pair.moved.parameter, bias_name(pair.moved.parameter)]
    return [name for name in (*names, *(one.parameter for one in pair.slices)) if name in parameters]


def bias_name(parameter: str) -> str:
    """The name of the bias that belongs to a weight, of a linear layer or of a stack of them."""
    return parameter.removesuffix("weight") + "bias" if parameter.endswith(".weight") else f"{parameter}_bias"


def _move(pair: Pair, parameters: Mapping[str, Tensor], draw: torch.Generator) -> None:
    size = len(parameters[f"{pair.source}.weight"]) if pair.moved is None else pair.moved.shape[0]
    factor = torch.ones(size)
    rows = torch.tensor(pair.rows) if pair.places is None else pair.places
    factor[rows] = _factors(len(rows), draw)
    device = next(iter(parameters.values())).device
    factor = factor.to(device)
    if pair.moved is None:
        weight, bias = parameters[f"{pair.source}.weight"].data, parameters.get(f"{pair.source}.bias")
        assert pair.offset is not None
        weight.add_(pair.offset).mul_(factor).sub_(pair.offset)
        if bias is not None:
            bias.data.mul_(factor)
    else:
        pair.moved.view(parameters[pair.moved.parameter].data).mul_(factor[:, None])
        bias = parameters.get(bias_name(pair.moved.parameter))
        if bias is not None:
            own = bias.data if bias.dim() == 1 else bias.data[pair.moved.place]
            own.mul_(factor)
    for one in pair.slices:
        one.view(parameters[one.parameter].data).div_(factor[rows.to(device)] ** pair.power)


def _distance(before: Tensor, after: Tensor) -> float:
    """The largest difference, relative to the largest number; infinity for another shape or numbers that are none."""
    if before.shape != after.shape:
        return float("inf")
    if not before.numel():
        return 0.0
    found = ((after - before).abs().amax() / before.abs().amax().clamp(min=1e-12)).item()
    return found if found == found else float("inf")
