"""The form of a deployed run: its fields, the resulting changes, and the sources that it rejects."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.utilities.callables import parameter_schema_from_entrypoint

from flows.errors import FlowError
from flows.form import NOW, VARIANTS, changes, check_reach
from flows.press import press
from tasks.settings import Settings, check_settings

UNTOUCHED: dict[str, Any] = {
    "model": NOW.model.source,
    "package": NOW.package.name,
    "variants": VARIANTS,
    "tasks": NOW.evaluation.tasks,
    "targets": NOW.targets,
    "values": {"calibration.samples": NOW.calibration.samples, "evaluation.limit": NOW.evaluation.limit},
    "others": [],
}


def chosen(**choices: Any) -> list[str]:
    return changes(NOW, **{**UNTOUCHED, **choices})


def settings(**changes: Any) -> Settings:
    """params.yaml with `section__key=value`."""
    values = yaml.safe_load(Path("params.yaml").read_text())
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return check_settings(values)


def test_unchanged_form_changes_nothing() -> None:
    assert chosen() == []


def test_only_differences_are_changed() -> None:
    values = {"calibration.samples": 8, "evaluation.limit": None}
    assert chosen(values=values) == ["calibration.samples=8", "evaluation.limit=null"]
    assert chosen(variants=["int8"]) == ["~variants.gptq-int4", "~variants.awq-int4", "~variants.auto"]
    assert chosen(tasks=["piqa_local"]) == ["evaluation.tasks=[piqa_local]"]
    assert chosen(targets=["vllm", "onnx"]) == ["targets=[vllm,onnx]"]
    assert chosen(others=["variants.int8.smoothing=0.5"]) == ["variants.int8.smoothing=0.5"]


def test_another_model_resets_checksum_and_licence() -> None:
    found = chosen(model="hf:acme/Tiny.LM-1B@v1")
    assert found == [
        "model.source=hf:acme/Tiny.LM-1B@v1",
        "model.sha256=null",
        "model.licence=null",
        "package.name=tiny-lm-1b",
    ]
    assert chosen(model="hf:acme/x@v1", package="mine")[-1] == "package.name=mine"


def test_empty_selection_is_refused_by_field() -> None:
    with pytest.raises(FlowError, match=r"^variants: none selected"):
        chosen(variants=[])
    with pytest.raises(FlowError, match=r"^tasks: none selected"):
        chosen(tasks=[])
    with pytest.raises(FlowError, match=r"^targets: none selected"):
        chosen(targets=[])


@pytest.mark.parametrize("source", ["path:/etc/model", "path:../../other", "path:~/model"])
def test_a_path_outside_the_workspace_is_refused_unless_it_is_committed(source: str) -> None:
    wanted = settings(model__source=source, model__sha256=None)
    with pytest.raises(FlowError, match="is outside the run's workspace"):
        check_reach(wanted, NOW)
    check_reach(wanted, wanted)
    check_reach(settings(model__source="path:models/mine", model__sha256=None), NOW)


def test_form_has_drop_downs_bounds_descriptions_and_defaults() -> None:
    schema = parameter_schema_from_entrypoint("flows/press.py:press")
    fields, kinds = schema.properties, schema.definitions
    assert list(fields) == list(inspect.signature(press.fn).parameters)
    assert not [name for name, field in fields.items() if not field.get("description")]
    assert kinds["VariantName"]["enum"] == VARIANTS
    assert kinds["TaskName"]["enum"] == [
        *NOW.evaluation.tasks,
        "boolq_local",
    ]  # the tasks in params.yaml, then the others in evals/
    assert fields["variants"]["default"] == VARIANTS
    assert fields["model"]["default"] == NOW.model.source
    assert fields["gate_four_bit"]["default"] == NOW.gate.four_bit
    assert fields["limit"]["default"] == NOW.evaluation.limit


SETTING = {  # field of the form -> its setting
    "package": "package.name",
    "samples": "calibration.samples",
    "limit": "evaluation.limit",
    "gate_four_bit": "gate.four_bit",
    "gate_eight_bit": "gate.eight_bit",
}
OF_THE_FORM_ALONE = {"model", "jobs"}  # a function checks the model's source, and jobs is not a setting
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "pattern")


def bounds(field: dict[str, Any]) -> dict[str, Any]:
    """The bounds of a value in a JSON schema; for an optional value, those of a non-empty one."""
    (there,) = [choice for choice in field.get("anyOf", [field]) if choice.get("type") != "null"]
    return {key: there[key] for key in BOUNDS if key in there}


def setting(schema: dict[str, Any], key: str) -> dict[str, Any]:
    """The schema of `section.key`."""
    section, name = key.split(".")
    reference = schema["properties"][section]["$ref"].rpartition("/")[2]
    return dict(schema["$defs"][reference]["properties"][name])


def test_bounds_of_the_form_equal_those_of_the_settings() -> None:
    fields = parameter_schema_from_entrypoint("flows/press.py:press").properties
    schema = Settings.model_json_schema()
    form = {name: found for name, field in fields.items() if (found := bounds(field))}
    assert set(form) == {*SETTING, *OF_THE_FORM_ALONE}
    assert {name: form[name] for name in SETTING} == {
        name: bounds(setting(schema, key)) for name, key in SETTING.items()
    }
