"""Load a quantized model as a dense one: exactly dequantized weights, and quantized activations.

For formats that transformers does not load without a GPU library: AutoAWQ's and AutoGPTQ's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tasks.activation_rounding import round_inputs
from tasks.errors import TaskError
from tasks.formats.stored import StoredModel
from tasks.tensor_files import EMBEDDING, OUTPUT


def load_dense(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the quantized model in `directory` as a dense one; TaskError if the tensors do not match its config."""
    stored = StoredModel(directory)
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    dense = {name: stored.tensor(name).to(dtype) for name in stored.dense}
    rounding = {}
    for name in stored.quantized:
        linear = stored.linear(name)
        dense[f"{name}.weight"] = linear.weight.weight().to(dtype)
        if linear.precision.symmetric_activations is not None:
            rounding[name] = linear.precision.symmetric_activations
    if config.tie_word_embeddings and OUTPUT in stored.quantized:  # also the embedding's weight
        dense[f"{EMBEDDING}.weight"] = dense[f"{OUTPUT}.weight"]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(dense, strict=False)
    # a tied output layer has no weights of its own
    tied = {f"{OUTPUT}.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise TaskError(
            f"{directory} does not fit its config.json: missing {sorted(set(missing) - tied)[:3]}, "
            f"unexpected {sorted(unexpected)[:3]}; rebuild it: modelpress run"
        )
    model.tie_weights()
    round_inputs(model, rounding)
    return model
