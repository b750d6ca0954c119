"""GGUF's blocks of 32 weights, as llama.cpp computes with them, and their packing.

Source: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. A block is a float16 scale d (and a
float16 minimum m), then the integers q: Q8_0 is d * q with q in -128..127, Q4_0 is d * (q - 8) and Q4_1 is d * q + m
with q in 0..15, q[i] and q[i + 16] sharing a byte. A group of several blocks repeats its scale in each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from tasks.errors import TaskError
from tasks.grid import QuantizedWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 32
FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


def block_type(name: str, solved: QuantizedWeight, bits: int) -> Type:
    """The GGUF type for the layer `name`; TaskError naming the supported values if there is none."""
    width, groups = solved.integers.shape[1], solved.scales.shape[1]
    if width % BLOCK or (groups > 1 and width // groups % BLOCK):
        raise TaskError(
            f"{name} has groups of {width // groups} in a width of {width}, but GGUF has a scale for each {BLOCK} "
            f"weights: widths and groups must be multiples of {BLOCK}; set group_size to 32, 64 or 128, "
            "or use another target"
        )
    match bits:
        case 8 if bool((solved.zeros == 128).all()):
            return Type.Q8_0
        case 8:
            raise TaskError(
                f"{name} has 8-bit weights with zero points, for which GGUF has no type; use a symmetric scheme, "
                "such as W8A16"
            )
        case 4:
            return Type.Q4_0 if bool((solved.zeros == 8).all()) else Type.Q4_1
        case _:
            raise TaskError(f"{name} has {bits}-bit weights, for which GGUF has no type; use 4 or 8 bits")


def pack_blocks(solved: QuantizedWeight, kind: Type) -> NDArray[np.uint8]:
    """Pack the layer in blocks of `kind`: uint8 [rows, bytes]. TaskError if a scale is too large for float16."""
    d = _each_block(solved.scales.float(), solved).to(torch.float16)
    if not d.isfinite().all():
        raise TaskError(f"a scale is {solved.scales.abs().max().item():.3g}, too large for GGUF's float16")
    q = solved.integers.view(*d.shape, BLOCK)
    match kind:
        case Type.Q8_0:
            parts = [_bytes(d), (q.to(torch.int16) - 128).to(torch.int8).view(torch.uint8)]
        case Type.Q4_0:
            parts = [_bytes(d), _halves(q)]
        case _:
            # from the stored scale, so that the zero point does not move
            m = -d.float() * _each_block(solved.zeros.float(), solved)
            parts = [_bytes(d), _bytes(m.to(torch.float16)), _halves(q)]
    return torch.cat(parts, -1).flatten(1).numpy()


def unpack_blocks(packed: NDArray[np.uint8], kind: Type, width: int) -> QuantizedWeight:
    """The inverse of `pack_blocks`, with groups of one block; zero points of Q4_1 are rounded from its minima."""
    rows = len(packed)
    blocks = torch.from_numpy(np.array(packed)).view(rows, width // BLOCK, -1)
    d = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    if kind == Type.Q8_0:
        q = blocks[..., 2:].view(torch.int8).to(torch.int16) + 128
        return QuantizedWeight(q.to(torch.uint8).reshape(rows, width), d, torch.full(d.shape, 128, dtype=torch.uint8))
    halves = blocks[..., 2 if kind == Type.Q4_0 else 4 :]
    q = torch.cat([halves & 15, halves >> 4], -1).reshape(rows, width)
    if kind == Type.Q4_0:
        return QuantizedWeight(q, d, torch.full(d.shape, 8, dtype=torch.uint8))
    m = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0]
    return QuantizedWeight(q, d, (-m.float() / d.float()).round().clamp(0, 15).to(torch.uint8))


def plain(tensor: Tensor) -> NDArray[np.uint8]:
    """A float tensor as its bytes: uint8 [..., bytes]."""
    data: NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
    return data


def _each_block(values: Tensor, solved: QuantizedWeight) -> Tensor:
    """[rows, groups] -> [rows, blocks]."""
    blocks = solved.integers.shape[1] // BLOCK
    return values.repeat_interleave(blocks // values.shape[1], dim=1)


def _bytes(values: Tensor) -> Tensor:
    """float16 [rows, blocks] -> uint8 [rows, blocks, 2]."""
    return values.contiguous()[..., None].view(torch.uint8)


def _halves(q: Tensor) -> Tensor:
    """uint8 [rows, blocks, 32] below 16 -> [rows, blocks, 16]."""
    return q[..., : BLOCK // 2] | (q[..., BLOCK // 2 :] << 4)
