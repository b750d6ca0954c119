"""llama.cpp's quantizer: a mixture of its types, chosen per layer, as by llama-quantize.

For a layer whose width is not a multiple of 256, llama.cpp uses blocks of 32 with more bits instead of K-quants.
"""

from __future__ import annotations

import json

import gguf
import torch

from tasks.activations.inputs import read_inputs
from tasks.formats.gguf.file import FAMILIES, NAME, write_gguf
from tasks.formats.gguf.llama_cpp import llama_cpp
from tasks.quantizers import QuantizeJob


def press_with_llama_cpp(job: QuantizeJob) -> None:
    """Write the model in its original precision, and quantize it with llama.cpp."""
    variant = job.variant
    write_gguf(job.source, job.destination)
    whole = (job.destination / NAME).rename(job.destination / "whole.part")
    engine = llama_cpp()
    try:
        engine.ask(
            "quantize",
            source=str(whole),
            destination=str(job.destination / NAME),
            scheme=variant.scheme,
            threads=torch.get_num_threads(),
            importance=_importance(job) if variant.imatrix else {},
        )
    finally:
        engine.close()
    whole.unlink()


def _importance(job: QuantizeJob) -> dict[str, list[float]]:
    """The mean square of each layer's inputs by llama.cpp's names."""
    config = json.loads((job.source / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(FAMILIES[config["model_type"]], layers)
    return {
        str(names.get_name(f"model.layers.{index}.{linear}.weight", try_suffixes=(".weight",))): (
            known.gram.diagonal() / job.tokens.numel()
        ).tolist()
        for index in range(layers)
        for linear, known in read_inputs(job.statistics, job.source, index, "cpu").items()
    }
