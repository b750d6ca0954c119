"""AutoAWQ's GEMM layout: 4-bit weights in groups with zero points, columns of the output interleaved in a word.

Source: AutoAWQ, awq/modules/linear/gemm.py. tasks/runtimes/awq_format.py reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tasks.runtimes.awq_format import pack
from tasks.solvers import Grid, Rounded


def pack_gemm(solved: Rounded) -> dict[str, Tensor]:
    """qweight int32 [width, rows / 8], qzeros int32 [groups, rows / 8], scales float16 [groups, rows]."""
    return {
        "qweight": pack(solved.integers.T),
        "qzeros": pack(solved.zeros.T),
        "scales": solved.scales.T.to(torch.float16).contiguous(),
    }


def gemm_config(grid: Grid) -> dict[str, Any]:
    """What AutoAWQ writes into config.json."""
    return {
        "bits": grid.bits,
        "group_size": grid.group_size,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
