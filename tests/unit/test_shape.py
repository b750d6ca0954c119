"""Parameters that a config.json stands for, held against published counts and against transformers itself."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.errors import TaskError
from tasks.model.family import ARCHITECTURES
from tasks.planning.shape import DENSE, EXPERTS, read_shape

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
LLAMA_3_70B = LLAMA_2_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
MIXTRAL_8X7B = LLAMA_2_7B | {
    "model_type": "mixtral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN_25_HALF_B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_3_70B, 70_553_706_496),
        (MIXTRAL_8X7B, 46_702_792_704),
        (QWEN_25_HALF_B, 494_032_768),
    ],
    ids=["Llama-2-7B", "Llama-3-70B", "Mixtral-8x7B", "Qwen2.5-0.5B"],
)
def test_published_models_have_the_parameters_that_they_are_published_with(
    config: dict[str, Any], parameters: int
) -> None:
    assert read_shape(config, "here").parameters == parameters


ODD = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        *({"model_type": family} for family in DENSE),
        {"model_type": "llama", "head_dim": 24, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 24, "attention_bias": True},
        {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
        {
            "model_type": "qwen2_moe",
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 56,
            "decoder_sparse_step": 2,
        },
        {
            "model_type": "qwen3_moe",
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "mlp_only_layers": [1],
        },
    ],
    ids=lambda config: "-".join(map(str, config.values()))[:40],
)
def test_the_count_is_that_of_transformers(config: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**(ODD | config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    assert read_shape(made.to_dict(), "here").parameters == sum(p.numel() for p in model.parameters())


def test_every_family_that_can_be_pressed_can_be_planned_for() -> None:
    assert set(ARCHITECTURES) == set(DENSE)
    assert not set(EXPERTS) & set(DENSE)


def test_a_token_meets_its_own_experts_alone() -> None:
    shape = read_shape(MIXTRAL_8X7B, "here")
    assert sum(layer.active for layer in shape.layers) + 2 * shape.embedding == pytest.approx(12.9e9, rel=0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "'bert'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many'"),
    ],
)
def test_what_is_no_config_of_a_decoder_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        read_shape(LLAMA_2_7B | change, "here")
