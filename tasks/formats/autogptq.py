"""AutoGPTQ's layout, as vLLM, GPTQModel and ONNX Runtime GenAI's model builder read it.

Source: AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py. `qweight` int32 [width * bits / 32, rows], the
inputs one after another from a word's lowest bits up; `qzeros` int32 [groups, rows * bits / 32], packed along the rows,
each zero point less one; `scales` float16 [groups, rows]; `g_idx` int32 [width], the group of each input.
A zero point of 0 has no place in it: some readers take -1 as it is and others modulo 16. `tasks/solvers` keeps it at 1.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from tasks.grid import Grid, QuantizedWeight

WORD = 32
GPTQMODEL = "gptqmodel:0.9.0"


def pack_autogptq(solved: QuantizedWeight, bits: int) -> dict[str, Tensor]:
    """The tensors of a layer, by the end of their names. ValueError if a zero point is 0."""
    if not solved.zeros.all():
        raise ValueError("a zero point is 0, which this layout cannot hold; solve on a grid with least_zero=1")
    width, groups = solved.integers.shape[1], solved.scales.shape[1]
    return {
        "qweight": _pack(solved.integers.T, bits),
        "qzeros": _pack(solved.zeros - 1, bits).T.contiguous(),
        "scales": solved.scales.T.to(torch.float16).contiguous(),
        "g_idx": (torch.arange(width) // (width // groups)).to(torch.int32),
    }


def unpack_autogptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int) -> QuantizedWeight:
    """What `pack_autogptq` packed."""
    return QuantizedWeight(
        _unpack(qweight, bits).T.contiguous(), scales.T.contiguous(), _unpack(qzeros.T, bits).contiguous() + 1
    )


def autogptq_config(grid: Grid, act_order: bool, damping: float) -> dict[str, Any]:
    """What AutoGPTQ writes into config.json. The groups lie in their own order, so `desc_act` is false whatever the
    order they were solved in was. GPTQModel takes zero points of this layout from itself alone, as of the version that
    wrote none of 0: `meta` names it as the layout's maker."""
    return {
        "bits": grid.bits,
        "checkpoint_format": "gptq",
        "damp_percent": damping,
        "desc_act": False,
        "group_size": grid.group_size,
        "lm_head": False,
        "meta": {"quantizer": [f"modelpress:{version('modelpress')}", GPTQMODEL]},
        "quant_method": "gptq",
        "static_groups": act_order,
        "sym": grid.symmetric,
        "true_sequential": False,
    }


def _pack(values: Tensor, bits: int) -> Tensor:
    """uint8 [many, columns] -> int32 [many * bits / 32, columns]."""
    each = WORD // bits
    parts = values.to(torch.int64).reshape(-1, each, values.shape[1])
    word = (parts << (torch.arange(each, device=values.device) * bits)[:, None]).sum(1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 [words, columns] -> uint8 [words * 32 / bits, columns]."""
    shifts = torch.arange(WORD // bits, device=packed.device) * bits
    return ((packed[:, None] >> shifts[:, None]) & (2**bits - 1)).to(torch.uint8).flatten(0, 1)
