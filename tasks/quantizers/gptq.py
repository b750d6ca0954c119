"""GPTQ (arXiv 2210.17323): 4-bit weights in groups, each column's rounding error made good by the next columns."""

from __future__ import annotations

from torch import Tensor

from tasks.formats.compressed import pack_words, words_config
from tasks.quantizers import Job
from tasks.quantizers.layerwise import Layer, left_alone, press_layers, round_layer
from tasks.settings import GptqSettings
from tasks.solvers import Grid, Rounded, gptq


def press(job: Job) -> None:
    """Solve every layer on the Gram matrices of its inputs."""
    variant = job.variant
    assert isinstance(variant, GptqSettings)  # the method named this module
    dtype = job.dtype
    grid = Grid(variant.bits, variant.group_size, variant.symmetric, dtype)
    act_order = variant.act_order == "static"

    def solve(weight: Tensor, gram: Tensor, limit: Tensor | None) -> Rounded:
        return gptq.solve(weight, gram, grid, act_order=act_order, damping=variant.damping, limit=limit)

    def press_layer(layer: Layer) -> dict[str, dict[str, Tensor]]:
        return {linear: pack_words(part, grid) for linear, part in round_layer(layer, grid, variant.clip, solve)}

    config = words_config(grid, act_order, left_alone(variant.skip_layers))
    press_layers(job, press_layer, config, dtype, variant.skip_layers)
