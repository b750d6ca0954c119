"""GPTQ (arXiv 2210.17323): 4-bit weights in groups, each column's rounding error made good by the next columns."""

from __future__ import annotations

from llmcompressor.modifiers.gptq import GPTQModifier

from tasks.quantizers import QuantizeJob
from tasks.quantizers.layerwise import left_alone
from tasks.quantizers.libraries.compressor import press_with_recipe
from tasks.settings import GptqSettings


def press(job: QuantizeJob) -> None:
    """Solve layer by layer on the calibration tokens, each layer seeing the ones before it quantized."""
    variant = job.variant
    assert isinstance(variant, GptqSettings)  # the method named this module
    weights = {
        "num_bits": variant.bits,
        "type": "int",
        "symmetric": variant.symmetric,
        "strategy": "group",
        "group_size": variant.group_size,
    }
    recipe = [
        GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
            actorder=None if variant.act_order == "none" else variant.act_order,
            dampening_frac=variant.damping,
            ignore=left_alone(variant.skip_layers),
        )
    ]
    press_with_recipe(job, recipe, pipeline="sequential", keep_scales=False)
