"""llm-compressor: SmoothQuant, then GPTQ or rounding to nearest, in compressed-tensors.

Computes in float32: precise enough for Hessians, and faster on processors without fast bfloat16. Saves in the source
model's precision.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
import transformers
from datasets import Dataset
from loguru import logger

from tasks.quantizers import QuantizeJob
from tasks.settings.variant import VariantSettings
from tasks.tensor_files import OUTPUT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 4


def press_with_llm_compressor(job: QuantizeJob) -> None:
    """Run the variant's recipe on the calibration tokens and write the model in compressed-tensors."""
    from llmcompressor import oneshot  # type: ignore[attr-defined]
    from transformers import AutoModelForCausalLM

    _only_warnings()

    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32, use_safetensors=True).eval()
    model.to(job.device)
    rows = job.tokens.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = oneshot(
        model=model,
        dataset=data,
        recipe=_recipe(job.variant),
        # GPTQ solves each layer on the output of the quantized layers before it; otherwise one pass is enough
        pipeline="sequential" if job.variant.rounding == "gptq" else "basic",
        num_calibration_samples=len(rows),
        max_seq_length=job.tokens.shape[1],
        shuffle_calibration_samples=False,
        batch_size=min(BATCH, len(rows)),
    )
    # per-row scales stay float32, which costs nothing
    _narrow(model, job.dtype, keep_scales=not job.variant.precision.weight_only)
    model.save_pretrained(job.destination, save_compressed=True)


def _recipe(variant: VariantSettings) -> list[Any]:
    """llm-compressor's recipe: its modifiers, in order."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    ignore = [OUTPUT, *(rf"re:.*\.layers\.{index}\..*" for index in variant.skip_layers)]
    groups = {"group_0": _scheme(variant)}
    recipe: list[Any] = []
    if variant.scaling == "smoothquant" and variant.smoothing is not None:  # the settings have both or neither
        recipe.append(SmoothQuantModifier(smoothing_strength=variant.smoothing, ignore=ignore))
    if variant.rounding == "gptq":
        order = None if variant.act_order == "none" else variant.act_order
        share = variant.damping_share
        recipe.append(GPTQModifier(config_groups=groups, actorder=order, dampening_frac=share, ignore=ignore))
    else:
        recipe.append(QuantizationModifier(config_groups=groups, ignore=ignore))
    return recipe


def _scheme(variant: VariantSettings) -> dict[str, Any]:
    """A scale per group or row; for activations, a dynamic scale per token."""
    scheme = variant.precision
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric}
    weights |= {"strategy": "group", "group_size": scheme.group_size} if scheme.group_size else {"strategy": "channel"}
    found: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if not scheme.weight_only:
        found["input_activations"] = {
            "num_bits": scheme.activation_bits,
            "type": "int",
            "symmetric": scheme.symmetric_activations,
            "strategy": "token",
            "dynamic": True,
        }
    return found


def _only_warnings() -> None:
    """Reduce llm-compressor's log to warnings; its progress bars stay."""
    transformers.utils.logging.disable_progress_bar()
    logger.remove()
    # METRIC, a custom level above WARNING, logs two lines per linear layer
    logger.add(sys.stderr, level="WARNING", format="{message}", filter=_is_relevant)
    warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")


def _is_relevant(record: Any) -> bool:
    """Whether the user can act on a message: a missing GPU is known, and the pipeline is our choice."""
    known = ("No accelerator available", "Attempting to calibrate on CPU", "Calibration pipeline is set to")
    return record["level"].name != "METRIC" and not record["message"].startswith(known)


def _narrow(model: PreTrainedModel, dtype: torch.dtype, keep_scales: bool) -> None:
    """Store weights, and scales unless kept, in the model's precision; integers are left unchanged."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == torch.float32 and not (keep_scales and name.endswith("_scale")):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
