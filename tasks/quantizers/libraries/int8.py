"""INT8, W8A8: SmoothQuant (arXiv 2211.10438), then weights rounded per output channel, activations per token."""

from __future__ import annotations

from typing import Any

from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

from tasks.quantizers import QuantizeJob
from tasks.quantizers.layerwise import left_alone
from tasks.quantizers.libraries.compressor import press_with_recipe
from tasks.settings import Int8Settings


def press(job: QuantizeJob) -> None:
    """Move the activations' outliers into the weights, then round the weights to 8 bits."""
    variant = job.variant
    assert isinstance(variant, Int8Settings)  # the method named this module
    ignore = left_alone(variant.skip_layers)
    recipe = [
        SmoothQuantModifier(smoothing_strength=variant.smoothing, ignore=ignore),
        QuantizationModifier(config_groups={"group_0": _scheme(variant.symmetric_activations)}, ignore=ignore),
    ]
    # the statistics need no error of earlier layers: one pass serves all
    press_with_recipe(job, recipe, pipeline="basic", keep_scales=True)


def _scheme(symmetric_activations: bool) -> dict[str, Any]:
    """Weights: a scale per output channel. Activations: a scale per token, found as the model runs."""
    return {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": {
            "num_bits": 8,
            "type": "int",
            "symmetric": symmetric_activations,
            "strategy": "token",
            "dynamic": True,
        },
    }
