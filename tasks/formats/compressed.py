"""compressed-tensors: weights of 4 bits packed in words, or of 8 bits as they are; what vLLM and transformers load.

Source: https://github.com/vllm-project/compressed-tensors, which packs and describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from torch import Tensor

from tasks.grid import Grid, QuantizedWeight


def pack_words(solved: QuantizedWeight, grid: Grid) -> dict[str, Tensor]:
    """weight_packed int32 [rows, width * bits / 32], weight_scale [rows, groups], weight_shape, weight_zero_point."""
    middle = 2 ** (grid.bits - 1)
    tensors = {
        "weight_packed": pack_to_int32(_signed(solved.integers, middle), grid.bits),
        "weight_scale": solved.scales,
        "weight_shape": torch.tensor(solved.integers.shape, dtype=torch.int64),
    }
    if not grid.symmetric:
        tensors["weight_zero_point"] = pack_to_int32(_signed(solved.zeros, middle), grid.bits, packed_dim=0)
    return tensors


def unpack_words(tensors: Mapping[str, Tensor]) -> tuple[QuantizedWeight, int]:
    """What `pack_words` packed, and its bits."""
    rows, width = tensors["weight_shape"].tolist()
    scales = tensors["weight_scale"]
    # a word holds a whole number of weights, and a row a whole number of words
    bits = 32 * tensors["weight_packed"].shape[1] // width
    middle = 2 ** (bits - 1)
    integers = unpack_from_int32(tensors["weight_packed"], bits, torch.Size((rows, width)))
    if "weight_zero_point" in tensors:
        packed = tensors["weight_zero_point"]
        zeros = _unsigned(unpack_from_int32(packed, bits, torch.Size(scales.shape), packed_dim=0), middle)
    else:
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8)
    return QuantizedWeight(_unsigned(integers, middle), scales, zeros), bits


def pack_bytes(solved: QuantizedWeight) -> dict[str, Tensor]:
    """weight int8 [rows, width], weight_scale float32 [rows, 1]; the zero lies in the middle."""
    return {"weight": _signed(solved.integers, 128), "weight_scale": solved.scales.float()}


def unpack_bytes(weight: Tensor, weight_scale: Tensor) -> QuantizedWeight:
    """What `pack_bytes` packed."""
    return QuantizedWeight(_unsigned(weight, 128), weight_scale, torch.full(weight_scale.shape, 128, dtype=torch.uint8))


def _signed(integers: Tensor, middle: int) -> Tensor:
    return (integers.to(torch.int16) - middle).to(torch.int8).contiguous()


def _unsigned(integers: Tensor, middle: int) -> Tensor:
    return (integers.to(torch.int16) + middle).to(torch.uint8)


def words_config(grids: Mapping[str, Grid], act_order: bool, ignore: list[str]) -> dict[str, Any]:
    """Weights in groups, activations as they are (W4A16).

    grids: of each linear layer that is packed, by its whole name. ignore: layers that are left alone.
    """
    layers: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        layers.setdefault(grid, []).append(name)
    groups = sorted(layers.items(), key=lambda group: -len(group[1]))
    schemes = []
    for grid, names in groups:
        weights = QuantizationArgs(
            num_bits=grid.bits,
            symmetric=grid.symmetric,
            strategy="group",
            group_size=grid.group_size,
            actorder="static" if act_order else None,
        )
        # the class says it for a uniform model; beside it, compressed-tensors would not look for names
        schemes.append(QuantizationScheme(targets=names if len(groups) > 1 else ["Linear"], weights=weights))
    return _config("pack-quantized", schemes, ignore)


def bytes_config(symmetric_activations: bool, ignore: list[str]) -> dict[str, Any]:
    """8-bit weights with a scale per row, 8-bit activations with a scale per token (W8A8)."""
    weights = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
    inputs = QuantizationArgs(num_bits=8, symmetric=symmetric_activations, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    return _config("int-quantized", [scheme], ignore)


def _config(kind: str, schemes: list[QuantizationScheme], ignore: list[str]) -> dict[str, Any]:
    config = QuantizationConfig(
        config_groups={f"group_{number}": scheme for number, scheme in enumerate(schemes)},
        format=kind,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    described: dict[str, Any] = config.model_dump(mode="json")
    return {**described, "quant_method": "compressed-tensors"}
