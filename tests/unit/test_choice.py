"""The selection of a model's files, and refused models."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tasks.companion_files import companion_files, small_files
from tasks.errors import TaskError
from tasks.sources.choice import check_config, weight_files
from tasks.sources.files import require_space, size

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MINE = {"model_type": "mine", "architectures": ["Mine"]}


def test_copies_of_the_weights_are_left_out() -> None:
    names = ["model.safetensors", "consolidated.safetensors", "model.fp16.safetensors", "original/model.safetensors"]
    assert weight_files(names, "here") == ["model.safetensors"]


def test_shards_are_taken_where_there_is_an_index() -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = [*shards, "model.safetensors.index.json", "consolidated.safetensors"]
    assert weight_files(names, "here") == shards


def test_the_index_may_name_its_files_otherwise() -> None:
    names = ["model.safetensors-00001-of-00002.safetensors", "experts.safetensors", "model.safetensors.index.json"]
    assert weight_files([*names, "other.safetensors"], "here", dict(zip("ab", names, strict=False))) == sorted(
        names[:2]
    )


def test_two_models_in_one_folder_are_refused() -> None:
    names = ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "model.safetensors"]
    with pytest.raises(TaskError, match=r"has both model.safetensors and model.safetensors.index.json"):
        weight_files(names, "here", {"a": names[0]})
    assert "model.safetensors" in weight_files(names, "here", {"a": "model.safetensors"})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["pytorch_model.bin", "config.json"], "only as pytorch_model.bin, which is refused"),
        (["adapter_model.safetensors"], "adapter_model.safetensors"),
        (["adapter_config.json", "model.safetensors"], r"holds an adapter \(adapter_config.json\)"),
        (["config.json"], "has no weights"),
        ([], "found nothing"),
    ],
)
def test_missing_safetensors_are_refused_with_the_files_found(names: list[str], said: str) -> None:
    with pytest.raises(TaskError, match=said):
        weight_files(names, "here")


def test_only_model_files_are_taken() -> None:
    taken = ["LICENSE", "LICENCE.md", "NOTICE", "chat_template.jinja", "config.json", "merges.txt", "tokenizer.model"]
    left = ["README.md", ".gitattributes", "modeling_x.py", "pytorch_model.bin", "onnx/config.json", "logo.png"]
    assert small_files([*left, *taken]) == sorted(taken)


PROCESSORS = {  # what the publishers put beside the weights
    "qwen-vl": "chat_template.json preprocessor_config.json video_preprocessor_config.json vocab.json merges.txt",
    "gemma3": "added_tokens.json chat_template.json preprocessor_config.json processor_config.json tokenizer.model",
    "mistral3": "SYSTEM_PROMPT.txt preprocessor_config.json processor_config.json tekken.json",
    "llama4": "LICENSE USE_POLICY.md chat_template.jinja preprocessor_config.json processor_config.json",
    "internvl": "preprocessor_config.json processor_config.json video_preprocessor_config.json",
    "audio": "feature_extractor_config.json audio_preprocessor_config.json special_tokens_map.json source.spm",
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_files_of_the_processor_are_fetched_and_kept(kind: str) -> None:
    names = PROCESSORS[kind].split()
    own = ["config.json", "model.safetensors.index.json"]
    assert companion_files(small_files([*names, *own, "linears.json", "source.json"])) == sorted(names)


def test_decoder_is_accepted_without_its_custom_code() -> None:
    with_code = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    check_config(with_code, "here")


@pytest.mark.parametrize(
    "config",
    [
        [],
        {},
        {"model_type": "vit"},
        {**LLAMA, "architectures": ["LlamaForSequenceClassification"]},
        {**LLAMA, "is_encoder_decoder": True},
        {**LLAMA, "quantization_config": {"quant_method": "awq"}},
    ],
)
def test_only_unquantized_decoders_are_accepted(config: Any) -> None:
    with pytest.raises(TaskError, match=r"^here"):
        check_config(config, "here")


@pytest.mark.parametrize("code", ["modeling_mine.Mine", "evil/code--modeling.Mine"])
def test_model_that_needs_custom_code_is_refused(code: str) -> None:
    with pytest.raises(TaskError, match=rf"custom Python code \({re.escape(code)}\), which is never run"):
        check_config({**MINE, "auto_map": {"AutoModelForCausalLM": code}}, "here")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (98362432, "98.4 MB"), (2e15, "2000.0 TB")],
)
def test_sizes_have_readable_units(number: float, text: str) -> None:
    assert size(number) == text


def test_free_space_is_checked_on_the_disk_of_a_new_folder(tmp_path: Any) -> None:
    require_space(tmp_path / "a" / "b", 1, "a download")
    with pytest.raises(TaskError, match=r"^a download needs 1000\.0 TB"):
        require_space(tmp_path / "a" / "b", 10**15, "a download")
