"""params.yaml is refused, with the field, its value and the remedy, when something in it cannot be."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.errors import TaskError
from tasks.scoring.eval_tasks import check_tasks
from tasks.settings import check_settings, load_settings

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
        ("evaluation/limits", 5, r"evaluation\.limits is no setting \(found 5\); remove it or mend the spelling"),
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
        ("onnx/output_layer", 16, r"onnx\.output_layer is 16: input should be 32, 8 or 4"),
        ("target", "tpu", r"target is 'tpu': input should be 'transformers', 'onnx' or 'gguf'"),
        ("variants", {}, r"variants: must hold the baseline"),
        ("variants", {"base": {"method": "none"}}, r"variants: holds nothing to compare"),
        ("variants", None, r"variants is None"),
        ("variants/twin", GPTQ, r"gptq-int4 and twin have the same settings"),
        ("variants/Bad_Name", {"method": "none"}, r"variants\.Bad_Name is 'Bad_Name'"),
        ("variants/int8/method", "int3", r"variants\.int8\.method must be one of none, int8, gptq, awq, auto, gguf"),
        ("variants/int8/smoothing", 2, r"variants\.int8\.smoothing is 2: input should be less than or equal to 1"),
        ("variants/gptq-int4/bits", 3, r"variants\.gptq-int4\.bits is 3: input should be 4"),
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
        ("target", "tpu", r"target is 'tpu'.*transformers"),
        ("package/name", "../up", r"package\.name is '\.\./up'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(path: str, value: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        check_settings(changed(path, value))


@pytest.mark.parametrize("section", ["evaluation", "benchmark"])
def test_an_onnx_graph_has_an_arithmetic_of_its_own(section: str) -> None:
    values = changed(f"{section}/dtype", "bfloat16")
    assert check_settings(values).target == "transformers"
    with pytest.raises(TaskError, match=rf"{section}\.dtype is bfloat16, but for the target onnx .* to float32"):
        check_settings(values | {"target": "onnx"})


def test_the_variant_that_is_proposed_would_do() -> None:
    with pytest.raises(TaskError) as caught:
        check_settings(changed("variants", {"base": {"method": "none"}}))
    (proposal,) = re.findall("such as `(.*)`", str(caught.value))
    assert check_settings(changed("variants", {"base": {"method": "none"}, **yaml.safe_load(proposal)}))


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
def test_a_file_that_is_no_mapping_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(TaskError, match=message):
        load_settings(tmp_path / "params.yaml")


def test_a_missing_file_says_where_to_be(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=re.escape(str(tmp_path))):
        load_settings(tmp_path / "params.yaml")


def test_settings_cannot_be_changed_once_they_are_checked() -> None:
    settings = check_settings(PARAMS)
    with pytest.raises(ValueError, match="frozen"):
        settings.target = "vllm"  # type: ignore[assignment]


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TaskError, match=r"names nonesuch, .*boolq_local, .*, piqa_local"):
        check_tasks(["piqa_local", "nonesuch"], Path("evals"))


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TaskError, match=r"no variant 'int2' in params\.yaml; there are: base, int8"):
        check_settings(PARAMS).variant("int2")
