"""Sums over the inputs of a decoder layer's linear layers: Gram matrix, largest and mean magnitude by channel.

Linear layers with the same input tensor, such as q, k and v, share their sums, under the name of the first. The output
layer has sums as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from tasks.activations.hearing import hearing
from tasks.activations.store import FEW, READERS, statistics_file
from tasks.model.decoder import Decoder
from tasks.model.linears import Origins
from tasks.model.products import Product
from tasks.model.structure import SEEN, LayerStructure
from tasks.tensor_files import OUTPUT, save

BLOCK = 384  # rows of a Gram matrix per product; only the upper blocks are computed, the lower ones are mirrored


class OtherTokensError(ValueError):
    """An input has read more tokens than there are weights for."""


class Sums:
    """Sums over the tokens of one input, float32. readers: the layers that read it; tokens: counted so far. products:
    whether the Gram matrix is summed as well."""

    def __init__(self, readers: list[str], channels: int, device: torch.device, products: bool = True) -> None:
        self.readers = readers
        self.tokens = 0
        size = channels if products else 0
        self._gram = torch.zeros(size, size, device=device)  # `add` fills only the upper blocks
        self._largest, self._total = torch.zeros(2, channels, device=device)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs [..., channels]. weights: of the tokens in the Gram matrix; None: all 1."""
        x = x.flatten(0, -2).float()
        magnitude = x.abs()
        torch.maximum(self._largest, magnitude.amax(0), out=self._largest)
        self._total += magnitude.sum(0)
        self.tokens += len(x)
        if not len(self._gram):
            return
        if weights is not None:
            x = x * weights.flatten().sqrt()[:, None]
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, x.shape[1], BLOCK):
                end = start + BLOCK
                self._gram[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])

    @classmethod
    def over(cls, parts: Iterable[Sums]) -> Sums:
        """The sums over all tokens of `parts`, of which there is at least one, without readers."""
        found: Sums | None = None
        for part in parts:
            if found is None:
                found = cls([], len(part._largest), part._largest.device, products=len(part._gram) > 0)
            found._gram += part._gram
            torch.maximum(found._largest, part._largest, out=found._largest)
            found._total += part._total
            found.tokens += part.tokens
        assert found is not None
        return found

    @classmethod
    def alike(cls, readers: list[str], channels: int, device: torch.device, products: bool = True) -> Sums:
        """As of channels without correlations that are all as large."""
        found = cls(readers, channels, device, products)
        if products:
            found._gram.fill_diagonal_(1)
        found._largest.fill_(1)
        found._total.fill_(1)
        found.tokens = 1
        return found

    def read_by(self, readers: list[str]) -> Sums:
        """A copy for other readers."""
        found = copy(self)
        found.readers, found._gram, found._largest = readers, self._gram.clone(), self._largest.clone()
        return found

    def forget_correlations(self) -> None:
        """Keep the diagonal of the Gram matrix alone."""
        self._gram = torch.diag(self._gram.diagonal().clone())

    def tensors(self) -> dict[str, Tensor]:
        """`gram`, if it was summed, `largest` and `mean` of tasks.activations.store.Input."""
        small = {"largest": self._largest, "mean": self._total / self.tokens}
        if not len(self._gram):
            return small
        for start in range(0, len(self._gram), BLOCK):
            end = start + BLOCK
            self._gram[end:, start:end] = self._gram[start:end, end:].T
        return {"gram": self._gram, **small}


@contextmanager
def recording_inputs(
    layer: nn.Module,
    structure: LayerStructure,
    origins: Origins,
    weights: Mapping[str, Tensor],
    wanted: Collection[str] | None = None,
    products: bool = True,
) -> Iterator[dict[str, Sums]]:
    """Record the sums of the inputs of the linear layers in `layer`, by the first reader of each input.

    weights: of the tokens, in the order in which they are read, by first reader; missing: all equal. wanted: first
    readers; None: all. products: see `Sums`. OtherTokensError if an input reads more tokens than it has weights.
    """
    sums: dict[str, Sums] = {}

    def hear(first: str, names: list[str], product: Product) -> None:
        if wanted is not None and first not in wanted:
            return
        x = product.x.detach()
        if first == names[0]:
            own = sums.setdefault(first, Sums([], x.shape[-1], x.device, products))
            weight, end = weights.get(first), own.tokens + x[..., 0].numel()
            if weight is not None and weight.numel() < end:
                raise OtherTokensError(first)
            own.add(x, None if weight is None else weight.flatten()[own.tokens : end])
        sums[first].readers.extend(name for name in names if name not in sums[first].readers)

    with hearing(layer, structure, origins, hear):
        yield sums


def experts_with_few(sums: Mapping[str, Sums], structure: LayerStructure, least: int) -> dict[str, int]:
    """The tokens of the experts that fewer than `least` were routed to, by the first linear layer of each."""
    seen = {name: sums[name].tokens if name in sums else 0 for name in structure.experts}
    kinds = dict.fromkeys(structure.experts.values())
    short = [name for kind in kinds for name, own in structure.experts.items() if own == kind and seen[name] < least]
    return {name: seen[name] for name in short}


def fill_experts(
    sums: dict[str, Sums],
    structure: LayerStructure,
    few: Mapping[str, int],
    device: torch.device,
    products: bool = True,
    wanted: Collection[str] | None = None,
    over_experts: Callable[[list[str]], Sums] | None = None,
) -> None:
    """Give the experts with few tokens other statistics, in place. few: from `experts_with_few`.

    What reads tokens that any expert may see takes the sums over all of the layer's experts. What reads what an expert
    itself has made takes its own, without their correlations, which few tokens do not tell; without any token, those
    of channels that are all alike, with which every solver rounds to the nearest.

    products: see `Sums`; wanted: see `recording_inputs`; over_experts: the sums over all these experts, where `sums`
    have only some.
    """
    over_experts = over_experts or (lambda names: Sums.over([sums[name] for name in names]))
    groups = {group[0]: group for group in structure.groups}
    asked = [name for name in few if wanted is None or name in wanted]
    for kind in dict.fromkeys(structure.experts[name] for name in asked):
        there = [name for name, own in structure.experts.items() if own == kind and few.get(name, 1)]
        shared = over_experts(there) if kind.endswith(SEEN) and there else None
        for name in (name for name in asked if structure.experts[name] == kind):
            if shared:
                sums[name] = shared.read_by(groups[name])
            elif few[name]:
                sums[name].forget_correlations()
            else:
                sums[name] = Sums.alike(groups[name], structure.linears[name].width, device, products)


@torch.no_grad()
def save_output_sums(decoder: Decoder, hidden: Sequence[Tensor], work: Path) -> None:
    """Save the sums of the output layer's input. hidden: what the last layer makes, in batches."""
    sums: Sums | None = None
    with decoder.states() as states:
        for rows in hidden:
            x = states(rows.float())
            sums = sums or Sums([OUTPUT], x.shape[-1], x.device)
            sums.add(x)
    assert sums is not None
    save_sums({OUTPUT: sums}, statistics_file(work, None))


def save_sums(sums: Mapping[str, Sums], path: Path, few: Mapping[str, int] | None = None) -> None:
    """Save a layer's sums for `tasks.activations.store.load_statistics`. few: from `experts_with_few`."""
    readers = json.dumps({name: one.readers for name, one in sums.items()})
    found = {f"{name}.{key}": tensor for name, one in sums.items() for key, tensor in one.tensors().items()}
    save(found, path, {READERS: readers} | ({FEW: json.dumps(few)} if few else {}))
