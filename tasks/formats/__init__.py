"""Serialization of quantized models: one module per format, behind one protocol.

Every format stores the solved integers, scales and zero points bit for bit. compressed_tensors, awq and gptq are
formats of a model directory, selected by `format` in params.yaml; exporters transcode into nbits and gguf/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tasks.errors import TaskError
from tasks.tensor_files import EMBEDDING, OUTPUT

if TYPE_CHECKING:
    import torch
    from torch import Tensor, dtype

    from tasks.grid import Grid, Precision, QuantizedWeight
    from tasks.schemes import Scheme

GROUP_SIZES = (16, 32, 64, 128, 256)
PACKED = 64  # rows, a multiple of what any format packs together


@dataclass(frozen=True)
class Layout:
    """The description of a quantized model for a format.

    shapes: (rows, width) of the quantized linear layers, by full name; precisions: by the same names. skipped:
    the prefixes of the decoder layers left unquantized; others: all that an engine may take for a linear layer,
    quantized or not, by name on disk: the name in memory. act_order, damping: GPTQ settings that formats record.
    """

    shapes: Mapping[str, tuple[int, int]]
    precisions: Mapping[str, Precision]
    skipped: Sequence[str] = ()
    others: Mapping[str, str] = field(default_factory=dict)
    act_order: bool = False
    damping: float = 0.0

    def only_precision(self) -> Precision:
        """The precision of all layers, for formats that hold only one. TaskError if there are several."""
        found = set(self.precisions.values())
        if len(found) != 1:
            raise TaskError(
                "the layers have different precisions, which this format cannot hold; set format to compressed-tensors"
            )
        return found.pop()


class Format(Protocol):
    """The format of a model directory."""

    @property
    def native(self) -> bool:
        """Whether Transformers loads it without a GPU library."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Name suffixes of a quantized linear layer's tensors."""

    def scale_dtype(self, model: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
        """The dtype of scales and unquantized tensors. TaskError if the format cannot store the requested one."""

    def grid(self, scheme: Scheme, scales: torch.dtype) -> Grid:
        """The grid of a scheme's weights in this format."""

    def check(self, layout: Layout) -> None:
        """TaskError naming the layer, the value and the supported values if the format cannot hold the model."""

    def pack(self, weight: QuantizedWeight, precision: Precision) -> dict[str, Tensor]:
        """The tensors of a linear layer, by name suffix."""

    def describe(self, layout: Layout) -> dict[str, Any]:
        """The `quantization_config` of config.json."""

    def check_config(self, config: Mapping[str, Any], where: str) -> None:
        """TaskError if a directory's quantization_config is of an unsupported kind."""

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StoredLinear:
        """The inverse of `pack`: the linear layer `name` from its tensors, by name suffix."""

    def shape(self, sizes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]) -> tuple[int, int]:
        """(rows, width) of a linear layer from its tensors' sizes, by name suffix; read: reads one tensor."""


@dataclass(frozen=True)
class StoredLinear:
    """A quantized linear layer."""

    weight: QuantizedWeight
    precision: Precision


def load_format(name: str) -> Format:
    """Return the format `name` of a model directory; TaskError if there is none."""
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


def packed_sizes(form: Format, precision: Precision, rows: int, width: int) -> dict[str, tuple[dtype, tuple[int, ...]]]:
    """Types and shapes of the tensors that the format packs a linear layer to, by the ends of their names.

    Of many rows a few are packed: the tensors grow with their number.
    """
    few = PACKED if rows % PACKED == 0 else rows
    small, twice = (form.pack(_blank(precision, count, width), precision) for count in (few, 2 * few))

    def grown(end: str) -> tuple[int, ...]:
        pairs = zip(small[end].shape, twice[end].shape, strict=True)
        return tuple(one + (two - one) * (rows - few) // few for one, two in pairs)

    return {end: (tensor.dtype, grown(end)) for end, tensor in small.items()}


def _blank(precision: Precision, rows: int, width: int) -> QuantizedWeight:
    import torch

    from tasks.grid import QuantizedWeight

    ones = torch.ones(rows, precision.grid.groups(width), dtype=torch.uint8)
    return QuantizedWeight(torch.zeros(rows, width, dtype=torch.uint8), ones.to(precision.grid.dtype), ones)


def check_groups(layout: Layout, advice: str = "") -> None:
    """TaskError naming the valid group sizes if one does not divide a layer's width. advice: another remedy."""
    for name, precision in layout.precisions.items():
        size, width = precision.grid.group_size, layout.shapes[name][1]
        if size and width % size:
            fitting = [g for g in GROUP_SIZES if all(w % g == 0 for _, w in layout.shapes.values())]
            raise TaskError(
                f"group_size is {size}, which does not divide the width {width} of {name}; "
                f"sizes that divide every layer: {', '.join(map(str, fitting)) or 'none'}{advice}"
            )


def check_rows(layout: Layout, together: int, name: str) -> None:
    """TaskError if a layer's number of rows is not a multiple of `together`, the packing unit of the format `name`."""
    for layer, (rows, _) in layout.shapes.items():
        if rows % together:
            raise TaskError(
                f"{layer} has {rows} rows, and the format {name} packs {together} at a time; "
                "set format to compressed-tensors for this model"
            )


def check_uniform(layout: Layout, name: str, bits: Sequence[int]) -> None:
    """TaskError if the format `name` cannot hold the model: it needs one weight-only precision of `bits` in all layers,
    and an unquantized embedding and output layer."""
    for layer in (OUTPUT, EMBEDDING):
        if layer in layout.precisions:
            raise TaskError(
                f"the precision of {layer} is set, but the format {name} holds only quantized decoder layers; "
                "set format to compressed-tensors, or leave it out"
            )
    precision = layout.only_precision()
    if precision.symmetric_activations is not None or precision.grid.bits not in bits:
        what = "rounded activations" if precision.symmetric_activations is not None else f"{precision.grid.bits} bits"
        raise TaskError(f"the format {name} does not support {what}; set format to compressed-tensors")


def float16_alone(name: str, asked: torch.dtype | None) -> torch.dtype:
    """The scale dtype of formats that store float16; TaskError if another one is requested."""
    import torch

    if asked not in (None, torch.float16):
        raise TaskError(f"scale_dtype is {str(asked).removeprefix('torch.')}, but the format {name} stores float16")
    return torch.float16
