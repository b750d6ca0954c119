"""How a pressed model is written down and read back: one module per format, behind one protocol.

A weight that was solved is the same thing in all of them: integers, scales and zero points, bit for bit. Of these,
compressed_tensors, awq and gptq are formats of a whole model directory, which `format` in params.yaml names; nbits
and gguf/ are what an exporter transcodes into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tasks.errors import TaskError
from tasks.tensor_files import EMBEDDING, OUTPUT

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tasks.grid import Grid, Precision, QuantizedWeight
    from tasks.schemes import Scheme

GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Layout:
    """A pressed model as a format is to write it.

    shapes: (rows, width) of the linear layers that are quantized, by their whole names; precisions: theirs, by the same
    names. skip_layers: decoder layers left alone. act_order, damping: of GPTQ, as formats record them.
    """

    shapes: Mapping[str, tuple[int, int]]
    precisions: Mapping[str, Precision]
    skip_layers: Sequence[int] = ()
    act_order: bool = False
    damping: float = 0.0

    def only_precision(self) -> Precision:
        """Of a format that knows one for all layers. TaskError if there are several."""
        found = set(self.precisions.values())
        if len(found) != 1:
            raise TaskError(
                "the layers have different precisions, which this format cannot hold; set format to compressed-tensors"
            )
        return found.pop()


class Format(Protocol):
    """A format of a model directory."""

    @property
    def native(self) -> bool:
        """Whether Transformers loads it without a library for GPUs."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Ends of the names of a quantized linear layer's tensors."""

    def scale_dtype(self, model: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
        """Of scales, and of all that is not quantized. TaskError if the format has no place for the one asked for."""

    def grid(self, scheme: Scheme, scales: torch.dtype) -> Grid:
        """The grid of a scheme's weights."""

    def check(self, layout: Layout) -> None:
        """TaskError naming the layer, what was found and what would fit, if the format cannot hold it."""

    def pack(self, weight: QuantizedWeight, precision: Precision) -> dict[str, Tensor]:
        """The tensors of a linear layer, by the ends of their names."""

    def describe(self, layout: Layout) -> dict[str, Any]:
        """The `quantization_config` of config.json."""

    def check_config(self, config: Mapping[str, Any], where: str) -> None:
        """TaskError if a directory's quantization_config is of a kind that cannot be read."""

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StoredLinear:
        """The linear layer `name` from its tensors, by the ends of their names: what `pack` packed."""

    def shape(self, sizes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]) -> tuple[int, int]:
        """(rows, width) of a linear layer from the sizes of its tensors, by the ends of their names; read: of one."""


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer as it was solved."""

    weight: QuantizedWeight
    precision: Precision


def load_format(name: str) -> Format:
    """The format of a model directory that is called `name`; TaskError if there is none."""
    match name:
        case "compressed-tensors":
            from tasks.formats.compressed_tensors import CompressedTensors

            return CompressedTensors()
        case "awq":
            from tasks.formats.awq import Awq

            return Awq()
        case "gptq":
            from tasks.formats.gptq import Gptq

            return Gptq()
        case _:
            raise TaskError(f"no format {name!r} for a model directory; there are: compressed-tensors, awq, gptq")


def check_groups(layout: Layout, advice: str = "") -> None:
    """TaskError, naming the sizes that fit, if groups do not divide a layer's width. advice: what else helps."""
    for name, precision in layout.precisions.items():
        size, width = precision.grid.group_size, layout.shapes[name][1]
        if size and width % size:
            fitting = [g for g in GROUP_SIZES if all(w % g == 0 for _, w in layout.shapes.values())]
            raise TaskError(
                f"group_size is {size}, which does not divide the width {width} of {name}; "
                f"sizes that divide every layer: {', '.join(map(str, fitting)) or 'none'}{advice}"
            )


def check_rows(layout: Layout, together: int, name: str) -> None:
    """TaskError if the rows of a layer cannot be packed so many together, as the format `name` does."""
    for layer, (rows, _) in layout.shapes.items():
        if rows % together:
            raise TaskError(
                f"{layer} has {rows} rows, and the format {name} packs {together} at a time; "
                "set format to compressed-tensors for this model"
            )


def check_uniform(layout: Layout, name: str, bits: Sequence[int]) -> None:
    """TaskError unless all layers have one precision of so many bits, activations stay as they are, and the embedding
    and the output layer as well: all that the format `name` holds."""
    for layer in (OUTPUT, EMBEDDING):
        if layer in layout.precisions:
            raise TaskError(
                f"the precision of {layer} is set, but the format {name} holds quantized decoder layers alone; "
                "set format to compressed-tensors, or leave it out"
            )
    precision = layout.only_precision()
    if precision.symmetric_activations is not None or precision.grid.bits not in bits:
        what = "rounded activations" if precision.symmetric_activations is not None else f"{precision.grid.bits} bits"
        raise TaskError(f"the format {name} has no place for {what}; set format to compressed-tensors")


def float16_alone(name: str, asked: torch.dtype | None) -> torch.dtype:
    """Of formats that store float16; TaskError if another precision was asked for."""
    import torch

    if asked not in (None, torch.float16):
        raise TaskError(f"scale_dtype is {str(asked).removeprefix('torch.')}, but the format {name} stores float16")
    return torch.float16
