"""Wrong values in params.yaml are refused with the field, its value and the remedy."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.activations.memory import EXPERT_TOKENS
from tasks.errors import TaskError
from tasks.scoring.eval_tasks import check_tasks
from tasks.settings import check_settings, load_settings
from tasks.settings.measuring import StatisticsSettings

PARAMS = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
LIBRARY = {**PARAMS["variants"]["gptq-int4"], "backend": "llm-compressor", "clip": False, "refine": 0}
GPTQ = PARAMS["variants"]["gptq-int4"]


def changed(path: str, value: Any) -> dict[str, Any]:
    values: dict[str, Any] = copy.deepcopy(PARAMS)
    *sections, key = path.split("/")
    place = values
    for section in sections:
        place = place[section]
    place[key] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("evaluation/limits", 5, r"evaluation\.limits is not a setting \(found 5\); remove it or fix the spelling"),
        ("evaluation/limit", "many", r"evaluation\.limit is 'many': input should be a valid integer"),
        ("evaluation/limit", 0, r"evaluation\.limit is 0: input should be greater than or equal to 1"),
        ("evaluation/limit", True, r"evaluation\.limit is True"),
        ("evaluation/tasks", [], r"evaluation\.tasks is \[\]"),
        ("evaluation/tasks", ["a", "a"], r"evaluation\.tasks: names a more than once"),
        ("calibration/sources", {}, r"calibration\.sources is \{\}"),
        ("calibration/sources/wiki/strip", "(", r"calibration\.sources\.wiki\.strip: is not a regular expression"),
        ("calibration/sources/wiki/format", "jsonl", r"calibration\.sources\.wiki: field is missing"),
        ("calibration/sources/wiki/weight", 0, r"weight is 0: input should be greater than 0"),
        ("model/sha256", "abc", r"model\.sha256 is 'abc'"),
        ("model/source", "SmolLM2", r"model\.source.*hf:.*path:.*wheel:"),
        ("model/dtype", "int3", r"model\.dtype is 'int3'.*bfloat16"),
        (
            "variants/v",
            {**GPTQ, "output_layer": "4@64"},
            r"variants\.v\.output_layer: '4@64' is no precision; write a scheme",
        ),
        (
            "variants/v",
            {**GPTQ, "output_layer": "W8A8"},
            r"variants\.v\.output_layer: must be weight-only: write W8A16@64",
        ),
        ("variants/v", {**GPTQ, "embedding": "none"}, r"variants\.v\.embedding: must be weight-only"),
        ("targets", ["tpu"], r"targets\.0 is 'tpu': input should be 'transformers', 'vllm', 'onnx' or 'gguf'"),
        ("targets", [], r"targets is \[\]: list should have at least 1 item"),
        ("targets", ["onnx", "vllm", "onnx"], r"targets: names onnx twice; name each target once"),
        ("target", "onnx", r"targets: \[onnx\]    # instead of target"),
        ("variants", {}, r"variants: must hold the baseline"),
        ("variants", {"base": {"scheme": "none"}}, r"variants: holds nothing to compare"),
        ("variants", None, r"variants is None"),
        ("variants/twin", GPTQ, r"gptq-int4 and twin have the same settings"),
        ("variants/Bad_Name", {"scheme": "none"}, r"variants\.Bad_Name is 'Bad_Name'"),
        (
            "variants/int8/scheme",
            "int3",
            r"variants\.int8\.scheme is 'int3': input should be 'none', 'W4A16', .*'W8A8', 'mixed', 'Q4_K_M'",
        ),
        ("variants/int8/smoothing", 2, r"variants\.int8\.smoothing is 2: input should be less than or equal to 1"),
        ("variants/gptq-int4/bits", 3, r"variants\.gptq-int4\.bits is not a setting \(found 3\); remove it"),
        ("variants/v", {**LIBRARY, "samples": 4096}, r"variants\.v\.samples is 4096, but calibration\.samples is only"),
        ("variants/int8/samples", 4, r"variants\.int8: samples is 4, but the backend modelpress uses the statistics"),
        ("variants/gptq-int4/backend", "llm-compressor", r"variants\.gptq-int4: clip is true, which llm-compressor"),
        ("variants/awq-int4/backend", "autoawq", r"variants\.awq-int4: rounding is gptq, which autoawq"),
        ("variants/awq-int4/backend", "gptqmodel", r"variants\.awq-int4\.backend is 'gptqmodel'.*autoawq"),
        ("gate/confidence", 1.0, r"gate\.confidence is 1\.0: input should be less than 1"),
        (
            "evaluation/texts/wiki",
            PARAMS["evaluation"]["texts"]["news"],
            r"wiki and evaluation\.texts\.wiki have",
        ),
        ("package/name", "../up", r"package\.name is '\.\./up'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(path: str, value: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        check_settings(changed(path, value))


@pytest.mark.parametrize("section", ["evaluation", "benchmark"])
def test_onnx_requires_float32(section: str) -> None:
    values = changed(f"{section}/dtype", "bfloat16")
    assert check_settings(values).targets == ["transformers"]
    with pytest.raises(TaskError, match=rf"{section}\.dtype is bfloat16, but for the target onnx .* to float32"):
        check_settings(values | {"targets": ["vllm", "onnx"]})


def test_proposed_variant_is_valid() -> None:
    with pytest.raises(TaskError) as caught:
        check_settings(changed("variants", {"base": {"scheme": "none"}}))
    (proposal,) = re.findall("such as `(.*)`", str(caught.value))
    assert check_settings(changed("variants", {"base": {"scheme": "none"}, **yaml.safe_load(proposal)}))


AUTO, INT8, AWQ = (PARAMS["variants"][name] for name in ("auto", "int8", "awq-int4"))


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({**INT8, "group_size": 64}, "group_size is 64, but W8A8 takes no group size; remove it"),
        (
            {**AUTO, "group_size": 64},
            "group_size is 64, but each candidate of the scheme mixed has its own, as in W4A16_",
        ),
        ({"scheme": "none", "clip": True}, r"scheme is none \(unquantized\), so clip has no effect; remove it"),
        ({"scheme": "none", "format": "awq"}, r"scheme is none \(unquantized\), so format has no effect"),
        (
            {**GPTQ, "symmetric_activations": True},
            "symmetric_activations is set, but W4A16_ASYM does not quantize activations",
        ),
        ({**GPTQ, "smoothing": 0.5}, "smoothing is set, but scaling is not smoothquant; set scaling to smoothquant or"),
        (
            without(INT8, "smoothing"),
            "smoothing is missing: the share of the difficulty that moves to the weights, such as 0",
        ),
        (without(AUTO, "smoothing"), "smoothing is missing"),
        ({**GPTQ, "fused": True}, "fused applies only to the scheme mixed, but scheme is W4A16_ASYM; remove it"),
        (
            {**GPTQ, "candidates": ["W8A8", "none"]},
            "candidates applies only to the scheme mixed, but scheme is W4A16_ASYM",
        ),
        ({**GPTQ, "retention": 0.9}, "retention applies only to the scheme mixed"),
        (without(AUTO, "bits_per_weight"), "needs one budget: bits_per_weight, such as 4.5, or retention, such as 0.9"),
        ({**AUTO, "retention": 0.9}, "needs one budget"),
        (without(AUTO, "candidates"), "candidates are missing: the precisions to choose from, such as"),
        (without(AUTO, "fused"), "fused is missing: true if the engine fuses q, k and v, as vLLM does, else false"),
        ({**AUTO, "format": "awq"}, "format is awq, which holds one scheme for all layers; set format to compressed-t"),
        ({**GPTQ, "scheme": "Q4_K_M"}, "group_size is 64, but Q4_K_M takes no group size; remove it"),
        (
            {"scheme": "Q4_K_M", "clip": True},
            "clip is true, which llama.cpp does not support; set clip to false or backend to modelpress",
        ),
        (
            {"scheme": "Q4_K_M", "backend": "modelpress"},
            "Q4_K_M, which only llama.cpp supports; set backend to llama.cpp",
        ),
        ({**GPTQ, "imatrix": True}, "imatrix applies only to llama.cpp's schemes; remove it"),
        ({**GPTQ, "format": "gguf"}, "format is gguf, but the target gguf converts from any other format; remove form"),
        (
            {**GPTQ, "samples": 4},
            "samples is 4, but the backend modelpress uses the statistics of all sequences; remove",
        ),
        (
            {**AWQ, "backend": "autoawq", "rounding": "nearest"},
            "refine is 1, which autoawq does not support; set refine to 0 or backend to modelpress",
        ),
        (
            {**AWQ, "backend": "autoawq", "rounding": "nearest", "refine": 0, "skip_layers": [1]},
            r"skip_layers is \[1\], which autoawq does not support; set skip_layers to \[\] or backend to modelpress",
        ),
        (
            {**AWQ, "backend": "autoawq", "rounding": "nearest", "refine": 0, "scheme": "W4A16"},
            "scheme is W4A16, which autoawq does not support; set scheme to W4A16_ASYM or backend to modelpress",
        ),
        (
            {**LIBRARY, "output_layer": "W8A16@64"},
            "output_layer is W8A16@64, which llm-compressor does not support; set output_layer to null or backend",
        ),
        (
            {**AUTO, "backend": "llm-compressor"},
            "scheme is mixed, which llm-compressor does not support; set scheme to W8A8 or",
        ),
    ],
)
def test_a_wrong_combination_is_one_clear_line(variant: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=rf"^params\.yaml: variants\.v: .*({message})") as caught:
        check_settings(changed("variants/v", variant))
    assert "\n" not in str(caught.value)
    assert ";" not in re.sub(r"; (set|remove)", "", str(caught.value))  # one finding, and the remedy


def test_invalid_candidates_are_named() -> None:
    for candidates, message in (
        (["W4A16_ASYM@64", "8@64"], r"candidates: '8@64' is no precision; write a scheme \(W4A16, .*W8A8\)"),
        (["W8A8", "W8A8"], r"candidates: names W8A8 more than once"),
        (["W8A8"], r"candidates is \['W8A8'\]: list should have at least 2 items"),
    ):
        with pytest.raises(TaskError, match=rf"variants\.auto\.{message}"):
            check_settings(changed("variants/auto/candidates", candidates))


def test_keys_override_the_preset() -> None:
    variant = check_settings(changed("variants/v", {"scheme": "W4A16", "group_size": 32})).variant("v")
    assert (variant.precision.bits, variant.precision.group_size, variant.precision.symmetric) == (4, 32, True)
    preset = check_settings(changed("variants/v", {"scheme": "W4A16"})).variant("v")
    assert preset.precision.group_size == 128
    assert check_settings(PARAMS).variant("int8").precision.symmetric_activations is False
    auto = check_settings(PARAMS).variant("auto").precisions["W8A8"]
    assert auto
    assert auto.symmetric_activations is False


def test_every_wrong_value_is_named_at_once() -> None:
    values = changed("evaluation/limit", -1)
    del values["gate"]
    with pytest.raises(TaskError) as caught:
        check_settings(values)
    assert "evaluation.limit is -1" in str(caught.value)
    assert "gate is missing" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("- 1", "holds list, expected a mapping"), ("", "holds NoneType, expected a mapping")],
)
def test_file_must_be_a_mapping(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(TaskError, match=message):
        load_settings(tmp_path / "params.yaml")


def test_missing_file_names_the_current_folder(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=re.escape(str(tmp_path))):
        load_settings(tmp_path / "params.yaml")


def test_settings_are_immutable() -> None:
    settings = check_settings(PARAMS)
    with pytest.raises(ValueError, match="frozen"):
        settings.targets = ["vllm"]


@pytest.mark.slow  # lm-eval reads the definitions of all its tasks
def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TaskError, match=r"names nonesuch, .*boolq_local, .*, piqa_local"):
        check_tasks(["piqa_local", "nonesuch"], Path("evals"))


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TaskError, match=r"no variant 'int2' in params\.yaml; there are: base, int8"):
        check_settings(PARAMS).variant("int2")


def test_tokens_of_an_expert_have_one_default() -> None:
    """No stage depends on the module of the settings, so the constant is where it is used."""
    assert StatisticsSettings(importance=True).expert_tokens == EXPERT_TOKENS == PARAMS["statistics"]["expert_tokens"]
