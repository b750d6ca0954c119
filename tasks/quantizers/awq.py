"""AWQ (arXiv 2306.00978): channels that matter are scaled up before the weights are rounded to 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.formats.awq_gemm import gemm_config, pack_gemm
from tasks.quantizers import Job
from tasks.quantizers.layerwise import NORMS, Layer, press_layers, round_layer
from tasks.settings import AwqSettings
from tasks.solvers import Grid, Rounded, gptq, rtn
from tasks.solvers.awq import search_scale

# what can take over a factor, and the layers that read it
SCALED = {**NORMS, "self_attn.v_proj": ["self_attn.o_proj"], "mlp.up_proj": ["mlp.down_proj"]}
DAMPING = 0.01  # where GPTQ does the rounding


def press(job: Job) -> None:
    """Search scales and clips layer by layer on the Gram matrices, round, and write AutoAWQ's GEMM format."""
    variant = job.variant
    assert isinstance(variant, AwqSettings)  # the method named this module
    # the format's scales are float16; what is not quantized goes with them
    grid = Grid(variant.bits, variant.group_size, symmetric=False, dtype=torch.float16)

    def solve(weight: Tensor, gram: Tensor, limit: Tensor | None) -> Rounded:
        if variant.rounding == "gptq":
            return gptq.solve(weight, gram, grid, act_order=True, damping=DAMPING, limit=limit)
        return rtn.solve(weight, grid, limit)

    def press_layer(layer: Layer) -> dict[str, dict[str, Tensor]]:
        for source, linears in SCALED.items():
            known = layer.inputs[linears[0]]
            # with fewer heads for values than for queries, a value is read through several channels
            if len(layer.weight(source)) == len(known.mean):
                factor = search_scale(layer.stacked(linears), known.gram, known.mean, grid)
                layer.scale_input(source, linears, factor, grid.dtype)
        return {linear: pack_gemm(part) for linear, part in round_layer(layer, grid, variant.clip, solve)}

    press_layers(job, press_layer, gemm_config(grid), grid.dtype, [])
