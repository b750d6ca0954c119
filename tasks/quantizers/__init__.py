"""Quantizers: write a model from a variant's settings, with our own quantizer (builtin.py) or a library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tasks.errors import TaskError
from tasks.settings.variant import BUILTIN, VariantSettings

if TYPE_CHECKING:
    from torch import Tensor, dtype


@dataclass(frozen=True)
class QuantizeJob:
    """One model to quantize.

    source: directory of the model, safetensors. tokens: int64 [samples, sequence_length], the calibration text.
    statistics: output directory of the statistics stage. device: "cpu" or "cuda". destination: an empty directory.
    """

    source: Path
    tokens: Tensor
    statistics: Path
    variant: VariantSettings
    device: str
    destination: Path

    @property
    def dtype(self) -> dtype:
        """The dtype of the source model."""
        import torch

        config = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        return cast("dtype", getattr(torch, config["dtype"]))


def press(job: QuantizeJob) -> None:
    """Write a complete model directory (weights, config.json with its quantization_config) to `job.destination`.

    The stage adds tokenizer and licence files, and makes the output atomic (tasks/quantize.py).
    """
    variant = job.variant
    if variant.is_baseline:
        from tasks.quantizers.baseline import link_model

        link_model(job)
        return
    match variant.backend:
        case "modelpress":
            from tasks.quantizers.builtin import press_model

            press_model(job)
        case "llm-compressor":
            from tasks.quantizers.libraries.llm_compressor import press_with_llm_compressor

            press_with_llm_compressor(job)
        case "autoawq":
            from tasks.quantizers.libraries.autoawq import press_with_autoawq

            press_with_autoawq(job)
        case "llama.cpp":
            from tasks.quantizers.libraries.llama_cpp import press_with_llama_cpp

            press_with_llama_cpp(job)
        case _:
            raise TaskError(f"no backend {variant.backend!r}; {BUILTIN} is always available")
