"""What a decoder's layers consist of: found out on the model itself, layer by layer, and proven there.

For each layer: its linear layers, which of them share an input, where a factor per channel can move, and what is left
in full precision and why. No family is named.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tasks.model.decoder import Decoder
from tasks.model.linears import Linear, Origins, why_left
from tasks.model.pairs import Heard, Pair, find_offsets, listen, propose, prove
from tasks.model.products import Slice
from tasks.output import write_json

FILE = "structure.json"
TOKENS = 64  # for discovery: enough to reach nearly every one of 128 experts of which each token takes 8
SEEN, OWN = "tokens", "own"  # experts' inputs: tokens that other experts may see as well, or what an expert made


@dataclass
class LayerStructure:
    """One decoder layer, by names on disk without `prefix`. linears: those to press; groups: of linear layers with the
    same input, in the order of the calls; pairs: used and rejected ones; left: matrices in full precision, and why.
    experts: by the first linear layer of a group that belongs to one expert, what such groups have in common (`SEEN`,
    `OWN`)."""

    prefix: str
    linears: dict[str, Linear]
    groups: list[list[str]]
    pairs: list[Pair] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    experts: dict[str, str] = field(default_factory=dict)

    def usable(self, grouped: bool = False) -> list[Pair]:
        """The proven pairs. grouped: with those in which several channels follow one row."""
        return [pair for pair in self.pairs if not pair.problem and (grouped or not pair.grouped)]


def discover(decoder: Decoder, tokens: Tensor) -> tuple[list[LayerStructure], Tensor, Tensor]:
    """The structure of each layer, and what the first and the last layer make of the tokens.

    decoder: with float32 products; tokens: int64 [1, length], some text. TaskError if the layers are not found, or are
    not called one after another."""
    hidden = decoder.embed([tokens])[0]
    found: list[LayerStructure] = []
    first: Tensor | None = None
    proposed: dict[Any, list[Pair]] = {}
    for index in tqdm(range(len(decoder)), desc="structure", unit="layer"):
        prefix = decoder.layer_prefix(index)
        if index not in decoder.order:
            names = [name for name, parameter in decoder.parameters(index).items() if parameter.dim() > 1]
            found.append(LayerStructure(prefix, {}, [], left=dict.fromkeys(names, "no text passes through the layer")))
            continue
        origins = decoder.origins(index)
        with decoder.layer(index) as layer:
            run = lambda: decoder.everything(index, layer, hidden)  # noqa: B023, E731 - called at once
            heard = listen(layer, run)
            one = _linears(layer, heard, origins, prefix, decoder.shared_weights(index))
            kind = (id(origins), tuple(tuple(group) for group in one.groups))
            if kind not in proposed:
                proposed[kind] = propose(layer, run, origins)
                find_offsets(layer, run, proposed[kind])
                for pair in (each for each in proposed[kind] if each.moved is None):
                    pair.stored = decoder.stored_module(index, pair.source)
            one.pairs = [replace(pair) for pair in proposed[kind]]
            for pair in one.pairs:
                pair.problem = pair.problem or _problem(pair, one)
            prove(layer, run, one.pairs)
            hidden = decoder.run(index, layer, hidden)
        first = hidden if first is None else first
        found.append(one)
    assert first is not None  # a decoder has a layer that text passes through
    return found, first, hidden


def _linears(layer: nn.Module, heard: list[Heard], origins: Origins, prefix: str, shared: set[str]) -> LayerStructure:
    """The linear layers that are heard, without those that are to stay in full precision."""
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    experts = {count for each in heard for one in each.slices if (count := one.stack(sizes[one.parameter])) > 1}
    kinds = _expert_kinds(heard, sizes)
    linears: dict[str, Linear] = {}
    rows: Counter[str] = Counter()
    readers: dict[str, set[int]] = {}
    left: dict[str, str] = {}
    groups: list[list[str]] = []
    common: dict[str, str] = {}
    for number, slices in enumerate(with_siblings(heard, sizes)):
        group: list[str] = []
        for slice_ in slices:
            pieces = origins.pieces(slice_)
            if not pieces:
                left[slice_.parameter] = "its weights are not rows or columns of a stored matrix"
            for piece in pieces:
                name = piece.linear.name
                linears[name] = piece.linear
                rows[name] += len(piece.rows)
                readers.setdefault(name, set()).add(number)
                group.append(name)
        groups.append(list(dict.fromkeys(group)))
        if group and slices[0].parameter in kinds:
            common[group[0]] = kinds[slices[0].parameter]
    for name, linear in linears.items():
        whole = rows[name] == linear.rows and len(readers[name]) == 1
        if why := why_left(linear, experts, shared) or ("" if whole else "its rows read different inputs"):
            left[name] = why
    for linear in [one for name, one in linears.items() if name in left and one.stacked]:  # a stack is pressed whole
        left |= {name: left[linear.name] for name, one in linears.items() if one.tensor == linear.tensor}
    kept = {name: linear for name, linear in linears.items() if name not in left}
    groups = [[name for name in group if name in kept] for group in groups]
    common = {name: kind for name, kind in common.items() if name in kept}
    return LayerStructure(prefix, kept, [group for group in groups if group], left=left, experts=common)


def with_siblings(heard: list[Heard], sizes: Mapping[str, int]) -> list[list[Slice]]:
    """What reads each input; for experts to which no token was routed, as for one that had some."""
    found, done = [], set()
    for one in heard:
        first = one.slices[0]
        count = first.stack(sizes[first.parameter])
        if count == 1 or len({each.parameter for each in one.slices}) < len(one.slices):
            found.append(one.slices)
        elif first.parameter not in done:
            done.add(first.parameter)
            found += [[each.at(place) for each in one.slices] for place in range(count)]
    return found


def _expert_kinds(heard: list[Heard], sizes: Mapping[str, int]) -> dict[str, str]:
    """By the parameter that stacks the experts' matrices, what these read. Where a token goes to several experts, its
    numbers appear in the inputs of several; where it goes to one, the first of the stacks reads tokens."""
    inputs: dict[str, list[Tensor]] = {}
    for one in heard:
        first = one.slices[0]
        if first.stack(sizes[first.parameter]) > 1:
            inputs.setdefault(first.parameter, []).append(one.x.flatten(0, -2))
    found = {}
    for number, (parameter, rows) in enumerate(inputs.items()):
        tokens = torch.cat(rows)
        repeated = len(tokens.unique(dim=0)) < len(tokens)
        found[parameter] = f"{parameter} {SEEN if repeated or number == 0 else OWN}"
    return found


def _problem(pair: Pair, one: LayerStructure) -> str:
    """Why a pair is not used, whatever the proof says."""
    for name in pair.readers:
        if name in one.left:
            return f"{name} reads it as well, which is left in full precision: {one.left[name]}"
    if pair.moved is None and pair.stored is None:
        return "the norm's weight is stored in another form"
    if pair.moved is None and any(one.linears[name].stacked for name in pair.readers):
        return "experts that saw no token read it as well"
    if pair.moved is not None and pair.source not in one.linears:
        return f"{pair.source} is left in full precision"
    return ""


def overview(layers: list[LayerStructure]) -> dict[str, list[dict[str, Any]]]:
    """What was found, for reading: the pairs used (`scaled`), those rejected, and the matrices left in full precision,
    each once with the number of layers it was found in. * stands for numbers, such as an expert's."""
    counts: dict[str, Counter[tuple[str, ...]]] = {"scaled": Counter(), "rejected": Counter(), "left": Counter()}
    for layer in layers:
        pairs = {(without_numbers(pair.name), _readers(pair), _reason(pair)) for pair in layer.pairs}
        counts["scaled"].update((source, readers) for source, readers, problem in pairs if not problem)
        counts["rejected"].update(pair for pair in pairs if pair[2])
        counts["left"].update({(without_numbers(name), why) for name, why in layer.left.items()})
    keys = {"scaled": ("source", "readers"), "rejected": ("source", "readers", "reason"), "left": ("name", "reason")}
    return {
        kind: [dict(zip(keys[kind], found, strict=True), layers=count) for found, count in sorted(own.items())]
        for kind, own in counts.items()
    }


def _readers(pair: Pair) -> str:
    return ", ".join(map(without_numbers, pair.readers))


def _reason(pair: Pair) -> str:
    asked = "only with grouped_values: several channels follow one row (grouped queries)" if pair.grouped else ""
    return pair.problem or asked


def without_numbers(name: str) -> str:
    """A name with * for each number in it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def write_structure(layers: list[LayerStructure], directory: Path) -> None:
    """Write structure.json."""
    write_json(directory / FILE, [_plain(one) for one in layers])


def read_structure(directory: Path) -> list[LayerStructure]:
    """Read what `write_structure` wrote."""
    found = json.loads((directory / FILE).read_text(encoding="utf-8"))
    return [
        LayerStructure(
            one["prefix"],
            {name: Linear.read(linear) for name, linear in one["linears"].items()},
            one["groups"],
            [_read_pair(pair) for pair in one["pairs"]],
            one["left"],
            one["experts"],
        )
        for one in found
    ]


def _plain(one: LayerStructure) -> dict[str, Any]:
    pairs = [
        {
            "source": pair.name,
            "offset": pair.offset,
            "power": pair.power,
            "rows": _ranges(pair.rows),
            "readers": pair.readers,
            "problem": pair.problem,
        }
        for pair in one.pairs
    ]
    linears = {name: asdict(linear) for name, linear in one.linears.items()}
    return {
        "prefix": one.prefix,
        "linears": linears,
        "groups": one.groups,
        "pairs": pairs,
        "left": one.left,
        "experts": one.experts,
    }


def _read_pair(values: Mapping[str, Any]) -> Pair:
    rows = [row for start, stop in values["rows"] for row in range(start, stop)]
    return Pair(values["source"], rows, values["readers"], values["offset"], values["power"], values["problem"])


def _ranges(rows: list[int]) -> list[tuple[int, int]]:
    """Runs of consecutive rows, as [start, stop)."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and row == found[-1][1]:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return found
