"""What the methods of llm-compressor share: load, run a recipe on the calibration tokens, save compact.

The arithmetic runs in float32: it is exact enough for Hessians and, on processors without fast bfloat16 units,
also faster. What is saved has the precision that the model came in.
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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 4


def press_with_recipe(job: QuantizeJob, recipe: list[Any], pipeline: str, keep_scales: bool) -> None:
    """Apply llm-compressor's `recipe` to the model and write it in compressed-tensors format.

    pipeline: "sequential" (layer by layer, each sees the layers before it quantized) or "basic" (one pass).
    keep_scales: scales stay float32 (one per output row costs nothing) instead of the model's precision.
    """
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
        recipe=recipe,
        pipeline=pipeline,
        num_calibration_samples=len(rows),
        max_seq_length=job.tokens.shape[1],
        shuffle_calibration_samples=False,
        batch_size=min(BATCH, len(rows)),
    )
    _narrow(model, job.dtype, keep_scales)
    model.save_pretrained(job.destination, save_compressed=True)


def _only_warnings() -> None:
    """llm-compressor tells of every layer; its bars and its warnings are what a person needs."""
    transformers.utils.logging.disable_progress_bar()
    logger.remove()
    # METRIC, a level of its own above WARNING, is two lines for every linear layer
    logger.add(sys.stderr, level="WARNING", format="{message}", filter=_is_news)
    warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")


def _is_news(record: Any) -> bool:
    """Whether a person can do something about it: that there is no GPU, they know, and the pipeline is our choice."""
    known = ("No accelerator available", "Attempting to calibrate on CPU", "Calibration pipeline is set to")
    return record["level"].name != "METRIC" and not record["message"].startswith(known)


def _narrow(model: PreTrainedModel, dtype: torch.dtype, keep_scales: bool) -> None:
    """Store weights, and scales unless kept, in the model's own precision; integers stay integers."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == torch.float32 and not (keep_scales and name.endswith("_scale")):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
