"""The distinct inputs of a model's linear layers, from its config.json and headers alone.

A few tokens pass through a layer of each kind, by the model's own code, with weights that are all zero. The system
keeps one page of zeros for all of them, so a layer of any size takes no memory.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.model.announced import AnnouncedLayer, announced
from tasks.model.decoder import Decoder
from tasks.model.pairs import listen
from tasks.model.skeleton import place, tensor_at
from tasks.model.structure import with_siblings, without_numbers
from tasks.tensor_files import TensorFiles

TOKENS = 8
UNCOUNTED = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE: more than the machine's memory may be asked for


def input_widths(model: Path) -> list[list[int]]:
    """For each decoder layer, the width of each distinct input of its linear layers: q, k and v share one, gate and up
    another, and each expert has its own. A layer through which no text passes has none.

    The statistics stage sums one Gram matrix for each (tasks/activations/gram.py). TaskError if the decoder layers are
    not found.
    """
    return [list(widths) for widths in _look(model, (model / "config.json").stat().st_mtime_ns)]


@lru_cache(maxsize=4)
def _look(model: Path, changed: int) -> list[list[int]]:
    decoder = _Weightless(model)
    layers = announced(model).layers
    hidden = decoder.embed([torch.zeros(1, TOKENS, dtype=torch.long)])[0]
    known: dict[str, list[int]] = {}
    found: list[list[int]] = []
    for index, announced_layer in enumerate(layers):
        if index not in decoder.order:
            found.append([])
            continue
        kind = decoder.kind(index)
        if kind not in known:
            with decoder.layer(index, {}) as layer:
                known[kind] = _widths(decoder, index, layer, announced_layer, hidden)
        found.append(known[kind])
    return found


def _widths(
    decoder: _Weightless, index: int, layer: nn.Module, announced_layer: AnnouncedLayer, hidden: Tensor
) -> list[int]:
    """Of one layer. An expert that no token reached, a module of its own, is taken to read as the others do."""
    heard = listen(layer, lambda: decoder.run(index, layer, hidden))
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    parameters = decoder.parameters_of(index, announced_layer)
    pressed = set(parameters.values())
    groups = [group for group in with_siblings(heard, sizes) if any(one.parameter in pressed for one in group)]
    reached = {one.parameter for group in groups for one in group}
    first = {without_numbers(group[0].parameter) for group in groups}
    unreached = [one for one in announced_layer.linears.values() if parameters[one.tensor] not in reached]
    alike = [one.width for one in unreached if without_numbers(parameters[one.tensor]) in first]
    return [group[0].shape[1] for group in groups] + alike


class _Weightless(Decoder):
    """A decoder whose weights are zero and take no memory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, torch.float32, "cpu")
        self.files = _Headers(directory)

    def kind(self, index: int) -> str:
        """What tells a layer from those that read alike: its parameters, its modules' switches and names of kinds."""
        shapes = [(name, tuple(parameter.shape)) for name, parameter in self.parameters(index).items()]
        switches = [
            (name, key, value)
            for name, module in self._layers[index].named_modules()
            for key, value in vars(module).items()
            if isinstance(value, bool | str)
        ]
        return str((shapes, switches))

    def parameters_of(self, index: int, layer: AnnouncedLayer) -> dict[str, str]:
        """The layer's parameter in memory that each stored tensor with linear layers becomes a part of, by name."""
        owners, inside = self.owners(index), self._inside(index)
        tensors = {linear.tensor for linear in layer.linears.values()}
        return {tensor: owners[layer.prefix + tensor][2].removeprefix(inside) for tensor in tensors}

    def _load(self, stored: Mapping[str, Tensor], names: list[str], matrices: torch.dtype) -> None:
        for name in names:
            known = tensor_at(self.model, name)
            place(self.model, name, _zeros(tuple(known.shape), known.dtype))


class _Headers(TensorFiles):
    """Tensors without their numbers."""

    def read(self, name: str) -> Tensor:
        """An empty tensor."""
        return torch.empty(0)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are overwritten."""
    count = math.prod(shape)
    if not count:
        return torch.zeros(shape, dtype=dtype)
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | UNCOUNTED
    memory: Any = mmap.mmap(-1, count * dtype.itemsize, flags=kind)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # one large page of zeros: reading many small ones takes seconds
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
