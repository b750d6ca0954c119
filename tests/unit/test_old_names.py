"""Model files that Transformers 4 and 5 read in the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tasks.download import download
from tasks.model.old_names import with_old_names
from tasks.settings import ModelSettings
from tests.tiny import tiny_model

IDS = torch.arange(6, 200)[None]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_type": "default", "rope_theta": 100000.0}, {"rope_theta": 100000.0}),
        (
            {"rope_type": "llama3", "rope_theta": 5000.0, **LLAMA3},
            {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        ),
    ],
)
def test_version_4s_names_are_added_and_version_5_reads_the_same(
    rope: dict[str, Any], old: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(tmp_path / "model")
    path = model / "config.json"
    config = json.loads(path.read_text()) | {"rope_parameters": rope}
    path.write_text(json.dumps(config))
    expected = _logits(model)
    named = with_old_names(config)
    assert named == config | old | {"torch_dtype": "bfloat16"}
    assert with_old_names(named) == named
    path.write_text(json.dumps(named))
    assert AutoConfig.from_pretrained(model).rope_parameters == rope
    assert torch.equal(_logits(model), expected)


def test_rotary_parameters_by_layer_type_are_left_alone() -> None:
    rope = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert with_old_names({"rope_parameters": rope}) == {"rope_parameters": rope}


def test_downloaded_model_names_a_tokenizer_class_that_version_4_has(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    assert json.loads((model / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    download(ModelSettings(source=f"path:{model}", dtype="bfloat16"), tmp_path / "source")
    values = json.loads((tmp_path / "source/tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "Ada paints the lamp of Ben\n\n near <s> the harbour  12."
    ours, theirs = (AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (tmp_path / "source", model))
    assert ours == theirs


def _logits(model: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(IDS).logits
    return found
