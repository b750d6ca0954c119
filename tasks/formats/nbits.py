"""ONNX Runtime's MatMulNBits: integers in blocks along the input, each block with a scale and a zero point.

Source: the operator's schema, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. A weight is
(integer - zero) * scale; integers are packed into bytes from the lowest bits. A block has a power of two of weights, at
least 16. The scale and zero point of a longer group are repeated for each of its blocks, which changes no weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tasks.errors import TaskError
from tasks.grid import QuantizedWeight

BYTE = 8
SMALLEST, LARGEST = 16, 64  # 64 decodes fastest, with 4 bits and with 8


@dataclass(frozen=True)
class Blocks:
    """A weight [rows, width] in the operator's layout. integers: uint8 [rows, blocks, bytes], scales: float32 [rows,
    blocks], zeros: uint8 [rows, bytes]."""

    integers: Tensor
    scales: Tensor
    zeros: Tensor


def block_size(name: str, group: int) -> int:
    """The block size of layer `name` for groups of `group` weights; TaskError if no block size divides them."""
    size = LARGEST
    while group % size:
        size //= 2
    if size < SMALLEST:
        raise TaskError(
            f"{name} has groups of {group}, but ONNX Runtime takes blocks of {SMALLEST}, 32 or {LARGEST} weights: "
            f"set group_size to a multiple of {SMALLEST}"
        )
    return size


def pack_blocks(solved: QuantizedWeight, bits: int, size: int) -> Blocks:
    """Pack the weight in blocks of `size`, which must divide the group size."""
    rows, width = solved.integers.shape
    repeat = width // solved.scales.shape[1] // size
    scales, zeros = (part.repeat_interleave(repeat, dim=1) for part in (solved.scales.float(), solved.zeros))
    integers = pack_bits(solved.integers, bits).view(rows, width // size, size * bits // BYTE)
    return Blocks(integers, scales, pack_bits(zeros, bits))


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] of `bits` each -> uint8 [rows, bytes]; a row's last byte is padded with 0."""
    each = BYTE // bits
    values = functional.pad(values, (0, -values.shape[1] % each)).view(len(values), -1, each)
    packed = torch.zeros_like(values[..., 0])
    for place in range(each):
        packed |= values[..., place] << (place * bits)
    return packed


def unpack_blocks(packed: Blocks, bits: int) -> QuantizedWeight:
    """The inverse of `pack_blocks`, with groups of one block."""
    rows, blocks, _ = packed.integers.shape
    return QuantizedWeight(
        unpack_bits(packed.integers.view(rows, -1), bits), packed.scales, unpack_bits(packed.zeros, bits)[:, :blocks]
    )


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """uint8 [rows, bytes] -> [rows, bytes * 8 / bits], from the lowest bits."""
    places = torch.arange(0, BYTE, bits, device=packed.device)
    values: Tensor = (packed[..., None] >> places) & (2**bits - 1)
    return values.to(torch.uint8).flatten(1)
