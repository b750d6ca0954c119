"""AutoAWQ's GEMM layout: 4-bit weights in groups with zero points, columns of the output interleaved in a word.

Source: AutoAWQ, awq/modules/linear/gemm.py. `qweight` int32 [width, rows / 8], eight 4-bit columns in a word in the
order 0 2 4 6 1 3 5 7; `qzeros` int32 [groups, rows / 8], packed alike; `scales` float16 [groups, rows].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tasks.grid import Grid, QuantizedWeight

BITS = 4
# where the columns 0..7 stand in a word, lowest four bits first
_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


def pack_gemm(solved: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a layer, by the end of their names."""
    return {
        "qweight": pack(solved.integers.T),
        "qzeros": pack(solved.zeros.T),
        "scales": solved.scales.T.to(torch.float16).contiguous(),
    }


def unpack_gemm(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedWeight:
    """What `pack_gemm` packed."""
    return QuantizedWeight(unpack(qweight).T.contiguous(), scales.T.contiguous(), unpack(qzeros).T.contiguous())


def gemm_config(grid: Grid, skip: Sequence[int] = ()) -> dict[str, Any]:
    """What AutoAWQ writes into config.json. skip: decoder layers that are left alone."""
    return {
        "bits": grid.bits,
        "group_size": grid.group_size,
        # what readers take for the beginning of a name, a pattern or a part of a name
        "modules_to_not_convert": [f"model.layers.{i}.{part}" for i in skip for part in ("self_attn", "mlp")] or None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


def pack(values: Tensor) -> Tensor:
    """uint8 [rows, columns] -> int32 [rows, columns / 8]."""
    columns = values.reshape(len(values), -1, len(_PLACES)).to(torch.int64)
    word = (columns << (_PLACES.to(values.device) * BITS)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """int32 [rows, columns / 8] -> uint8 [rows, columns], the columns in their own order."""
    words = packed[:, :, None] >> (_PLACES.to(packed.device) * BITS)
    return (words & (2**BITS - 1)).to(torch.uint8).flatten(1)
