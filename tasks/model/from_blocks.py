"""Dequantize models that are published in FP8 by blocks (DeepSeek) or in MXFP4 (gpt-oss).

FP8: a weight in float8_e4m3fn and NAME_scale_inv, a factor for each block of rows and columns. MXFP4, of the OCP
Microscaling specification: NAME_blocks, two 4-bit floating-point numbers in a byte, 32 of them with one exponent in
NAME_scales; the matrices of a stack are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from tasks.errors import TaskError
from tasks.sources.choice import by_blocks
from tasks.tensor_files import save

FP8, MXFP4 = "FP8", "MXFP4"
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


def block_type(quantization: Mapping[str, Any]) -> str | None:
    """Which of the two a `quantization_config` describes; None if neither."""
    if not by_blocks(quantization):
        return None
    return MXFP4 if quantization["quant_method"] == "mxfp4" else FP8


def dequantize_blocks(
    weights: Mapping[str, Path], quantization: Mapping[str, Any], dtype: str, scratch: Path
) -> dict[str, Path]:
    """Write the weight files to `scratch` with full tensors in `dtype`, a torch name; the new files, by file name.

    TaskError if a tensor has no factors, or factors for other blocks.
    """
    kind, number = block_type(quantization), getattr(torch, dtype)
    place: dict[str, Path] = {}
    for path in weights.values():
        with safe_open(path, framework="pt") as file:
            place |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> Tensor:
        if name not in place:
            raise TaskError(f"the model is in {kind}, but its files hold no {name}; fetch the model again")
        with safe_open(place[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    found = {}
    for file_name, path in tqdm(weights.items(), desc=f"{kind} to {dtype}", unit="file"):
        tensors = {}
        for name in (name for name, own in place.items() if own == path):
            if name.endswith(_BLOCKS) and kind == MXFP4:
                stem = name.removesuffix(_BLOCKS)
                tensors[stem] = _from_mxfp4(read(name), read(f"{stem}{_SCALES}")).to(number)
            elif (name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in place) or name.endswith(_SCALE):
                continue
            else:
                tensor = read(name)
                if tensor.dtype == torch.float8_e4m3fn:
                    factors, block = read(f"{name}{_SCALE}"), quantization["weight_block_size"]
                    _check_factors(name, tensor, factors, block)
                    tensor = _from_fp8(tensor, factors, block)
                tensors[name] = tensor.to(number) if tensor.is_floating_point() else tensor
        save(tensors, scratch / file_name)
        found[file_name] = scratch / file_name
    return found


def full_names(index: Mapping[str, str]) -> dict[str, str]:
    """An index of the dequantized tensors, from that of the stored ones."""
    names = {name.removesuffix(_BLOCKS): file for name, file in index.items() if not name.endswith(_SCALE)}
    return {
        name: file
        for name, file in names.items()
        if not (name.endswith(_SCALES) and name.removesuffix(_SCALES) in names)
    }


def _check_factors(name: str, weight: Tensor, factors: Tensor, block: list[int]) -> None:
    sizes = zip(weight.shape[-2:], block, strict=True)
    expected = [*weight.shape[:-2], *(-(-size // width) for size, width in sizes)]
    if list(factors.shape) != expected:
        raise TaskError(
            f"{name}{_SCALE} has the shape {list(factors.shape)}, but blocks of {block} in {list(weight.shape)} "
            f"weights need {expected}; fetch the model again, or correct weight_block_size in its config.json"
        )


def _from_fp8(weight: Tensor, factors: Tensor, block: list[int]) -> Tensor:
    """weight [..., rows, columns], factors [..., rows / block, columns / block], rounded up -> float32."""
    rows, columns = weight.shape[-2:]
    whole = factors.float().repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)
    return weight.float() * whole[..., :columns]


def _from_mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """blocks uint8 [..., rows, groups, 16], exponents uint8 [..., rows, groups] -> float32 [..., 32 groups, rows]."""
    numbers = torch.tensor([*_HALF, *(-one for one in _HALF)])
    pairs = torch.stack([blocks & 0xF, blocks >> 4], -1).flatten(-2).long()  # the low half first
    values = torch.ldexp(numbers[pairs], exponents.int()[..., None] - _BIAS)
    return values.flatten(-2).transpose(-2, -1).contiguous()
