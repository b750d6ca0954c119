"""GGUF's blocks of 32 weights, and how our integers fit into them: what llama.cpp computes with.

Source: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. A block is a float16 scale d (and a
float16 minimum m), then the integers q: Q8_0 is d * q with q in -128..127, Q4_0 is d * (q - 8) and Q4_1 is d * q + m
with q in 0..15, q[i] and q[i + 16] sharing a byte. A group of several blocks repeats its scale in each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from torch import Tensor

from tasks.errors import TaskError
from tasks.grid import QuantizedWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 32
FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


def block_type(name: str, solved: QuantizedWeight, bits: int) -> Type:
    """The type whose blocks hold the layer `name`; TaskError, naming what would fit, if none does.

    8 bits with zero points elsewhere than in the middle have no type: they are rounded anew, to Q8_0.
    """
    width, groups = solved.integers.shape[1], solved.scales.shape[1]
    if width % BLOCK or (groups > 1 and width // groups % BLOCK):
        raise TaskError(
            f"{name} has groups of {width // groups} in a width of {width}, but GGUF has a scale for each {BLOCK} "
            f"weights: widths and groups must be multiples of {BLOCK}; set group_size to 32, 64 or 128, "
            "or use another target"
        )
    match bits:
        case 8:
            return Type.Q8_0
        case 4:
            return Type.Q4_0 if bool((solved.zeros == 8).all()) else Type.Q4_1
        case _:
            raise TaskError(f"{name} has {bits}-bit weights, which GGUF has no type for; it has them for 4 and 8 bits")


def pack_blocks(solved: QuantizedWeight, kind: Type) -> NDArray[np.uint8]:
    """The layer as blocks of `kind`: uint8 [rows, bytes]. TaskError if a scale is too large for float16."""
    if kind == Type.Q8_0 and not bool((solved.zeros == 128).all()):
        return round_blocks(solved.weight())
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
            # of the scale as it is stored, so that the zero point stays where it was solved to be
            m = -d.float() * _each_block(solved.zeros.float(), solved)
            parts = [_bytes(d), _bytes(m.to(torch.float16)), _halves(q)]
    return torch.cat(parts, -1).flatten(1).numpy()


def round_blocks(weight: Tensor) -> NDArray[np.uint8]:
    """A weight [rows, width] rounded to the nearest of Q8_0: uint8 [rows, bytes]."""
    packed: NDArray[np.uint8] = quants.quantize(np.ascontiguousarray(weight.float().numpy()), Type.Q8_0)
    return packed


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
