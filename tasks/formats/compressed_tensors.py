"""compressed-tensors, for vLLM and transformers: weights packed in words, or stored as int8.

Packing and config are those of https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tasks.errors import TaskError
from tasks.formats import Layout, StoredLinear, check_groups
from tasks.grid import Grid, Precision, QuantizedWeight
from tasks.tensor_files import OUTPUT

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from tasks.schemes import Scheme

SMALLEST = 16  # a group size is halved until it divides a layer's width, but not below this
_INT8_SCALES = torch.float32  # dtype of the scales of int8 weights: one per row costs nothing


class CompressedTensors:
    """See the protocol `Format`. Layers may have different precisions; activations may be quantized."""

    native = True
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight")

    def scale_dtype(self, model: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
        """See `Format`."""
        return asked or model

    def grid(self, scheme: Scheme, scales: torch.dtype) -> Grid:
        """See `Format`."""
        return Grid(scheme.bits, scheme.group_size, scheme.symmetric, scales if scheme.weight_only else _INT8_SCALES)

    def check(self, layout: Layout) -> None:
        """See `Format`."""
        fitted = {}
        for name, precision in layout.precisions.items():
            grid = precision.grid.fitted(layout.shapes[name][1])
            even = grid.group_size is None or grid.group_size >= SMALLEST
            fitted[name] = Precision(grid) if even else precision
        check_groups(Layout(layout.shapes, fitted))

    def pack(self, weight: QuantizedWeight, precision: Precision) -> dict[str, Tensor]:
        """8 bits with a scale for each row: weight int8 [rows, width], weight_scale float32 [rows, 1]. Others:
        weight_packed int32 [rows, width * bits / 32], weight_scale [rows, groups], weight_shape, weight_zero_point."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        grid = precision.grid
        if _is_int8(precision):
            return {"weight": _signed(weight.integers, grid.middle), "weight_scale": weight.scales.float()}
        tensors = {
            "weight_packed": pack_to_int32(_signed(weight.integers, grid.middle), grid.bits),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor(weight.integers.shape, dtype=torch.int64),
        }
        if not grid.symmetric:
            zeros = _signed(weight.zeros, grid.middle)
            tensors["weight_zero_point"] = pack_to_int32(zeros, grid.bits, packed_dim=0)
        return tensors

    def describe(self, layout: Layout) -> dict[str, Any]:
        """See `Format`."""
        from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

        layers: dict[Precision, list[str]] = {}
        for name, precision in layout.precisions.items():
            layers.setdefault(precision, []).append(name)
        groups = sorted(layers.items(), key=lambda group: -len(group[1]))
        # a uniform model targets the class; with a class target, compressed-tensors ignores names
        schemes = [
            _scheme(precision, names if len(groups) > 1 else ["Linear"], layout.act_order)
            for precision, names in groups
        ]
        formats = {"int-quantized" if _is_int8(precision) else "pack-quantized" for precision in layers}
        for scheme, (precision, _) in zip(schemes, groups, strict=True):
            if len(formats) > 1:
                scheme.format = "int-quantized" if _is_int8(precision) else "pack-quantized"
        config = QuantizationConfig(
            config_groups={f"group_{number}": scheme for number, scheme in enumerate(schemes)},
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=left_alone(layout),
        )
        described: dict[str, Any] = config.model_dump(mode="json")
        return {**described, "quant_method": "compressed-tensors"}

    def check_config(self, config: Mapping[str, Any], where: str) -> None:
        """See `Format`."""
        kinds = {config.get("format")} | {group.get("format") for group in config.get("config_groups", {}).values()}
        if unknown := kinds - {None, "pack-quantized", "int-quantized", "mixed-precision"}:
            raise TaskError(f"{where} holds compressed-tensors of the unsupported kind {unknown.pop()}")

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StoredLinear:
        """See `Format`."""
        activations = _symmetric_activations(name, config)
        if "weight_packed" not in tensors:
            scales = tensors["weight_scale"]
            zeros = torch.full(scales.shape, 128, dtype=torch.uint8)
            grid = Grid(8, None, True, scales.dtype)
            return StoredLinear(
                QuantizedWeight(_unsigned(tensors["weight"], 128), scales, zeros), Precision(grid, activations)
            )
        weight, bits = _unpack_words(tensors)
        size = weight.group_size if weight.scales.shape[1] > 1 else None
        grid = Grid(bits, size, "weight_zero_point" not in tensors, weight.scales.dtype)
        return StoredLinear(weight, Precision(grid, activations))

    def shape(self, sizes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]) -> tuple[int, int]:
        """See `Format`."""
        rows, width = read("weight_shape").tolist() if "weight_shape" in sizes else sizes["weight"]
        return rows, width


def left_alone(layout: Layout) -> list[str]:
    """compressed-tensors' ignore list: the output layer, skipped decoder layers, and other unquantized linear
    layers."""
    skipped = [rf"re:.*\.{re.escape('.'.join(prefix.split('.')[-3:]))}.*" for prefix in layout.skipped]
    others = [name for name in layout.shapes if name not in layout.precisions]
    for name, own in layout.others.items():
        if name not in layout.shapes and not name.startswith(tuple(layout.skipped) or (" ",)):
            others += dict.fromkeys((name, own))
    return [*([] if OUTPUT in layout.precisions else [OUTPUT]), *skipped, *others]


def _is_int8(precision: Precision) -> bool:
    """Whether weights are stored as int8, not packed in words: where activations are quantized."""
    return precision.symmetric_activations is not None


def _scheme(precision: Precision, names: list[str], act_order: bool) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    grid = precision.grid
    if _is_int8(precision):
        weights = QuantizationArgs(num_bits=grid.bits, symmetric=True, strategy="channel")
        inputs = QuantizationArgs(num_bits=8, symmetric=precision.symmetric_activations, strategy="token", dynamic=True)
        return QuantizationScheme(targets=names, weights=weights, input_activations=inputs)
    weights = QuantizationArgs(
        num_bits=grid.bits,
        symmetric=grid.symmetric,
        strategy="group" if grid.group_size else "channel",
        group_size=grid.group_size,
        actorder="static" if act_order else None,
    )
    return QuantizationScheme(targets=names, weights=weights)


def _symmetric_activations(name: str, config: Mapping[str, Any]) -> bool | None:
    """Whether the input of the layer `name` is rounded symmetrically; None: not quantized."""
    for group in config.get("config_groups", {}).values():
        if name in group["targets"] or "Linear" in group["targets"]:
            inputs = group.get("input_activations")
            return bool(inputs["symmetric"]) if inputs else None
    return None


def _unpack_words(tensors: Mapping[str, Tensor]) -> tuple[QuantizedWeight, int]:
    """Unpack weights from words; also return their bits."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    rows, width = tensors["weight_shape"].tolist()
    scales = tensors["weight_scale"]
    # words hold whole weights, and rows whole words
    bits = 32 * tensors["weight_packed"].shape[1] // width
    middle = 2 ** (bits - 1)
    integers = unpack_from_int32(tensors["weight_packed"], bits, torch.Size((rows, width)))
    if "weight_zero_point" in tensors:
        packed = tensors["weight_zero_point"]
        zeros = _unsigned(unpack_from_int32(packed, bits, torch.Size(scales.shape), packed_dim=0), middle)
    else:
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8)
    return QuantizedWeight(_unsigned(integers, middle), scales, zeros), bits


def _signed(integers: Tensor, middle: int) -> Tensor:
    return (integers.to(torch.int16) - middle).to(torch.int8).contiguous()


def _unsigned(integers: Tensor, middle: int) -> Tensor:
    return (integers.to(torch.int16) + middle).to(torch.uint8)
