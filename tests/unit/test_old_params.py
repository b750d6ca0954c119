"""A params.yaml of commit 7e53a78 is refused, and each printed replacement is valid."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.errors import TaskError
from tasks.old_words import new_variant
from tasks.settings import Settings, check_settings

PARAMS = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
# from params.yaml of that commit
OLD: dict[str, dict[str, Any]] = {
    "base": {"method": "none"},
    "int8": {
        "method": "int8",
        "backend": "modelpress",
        "smoothing": 0.5,
        "rounding": "gptq",
        "symmetric_activations": False,
    },
    "gptq-int4": {
        "method": "gptq",
        "backend": "modelpress",
        "bits": 4,
        "group_size": 64,
        "symmetric": False,
        "act_order": "static",
        "damping": 0.05,
        "clip": True,
        "refine": 1,
        "propagate": False,
        "format": "compressed-tensors",
    },
    "awq-int4": {
        "method": "awq",
        "backend": "modelpress",
        "bits": 4,
        "group_size": 64,
        "clip": True,
        "rounding": "gptq",
        "refine": 1,
        "propagate": False,
        "format": "awq",
    },
    "auto": {
        "method": "auto",
        "backend": "modelpress",
        "bits_per_weight": 4.5,
        "candidates": ["4@64", "4@128", "8@64", "8@128"],
        "fused": False,
        "refine": 2,
        "propagate": False,
    },
}
GPTQ, AWQ = OLD["gptq-int4"], OLD["awq-int4"]
# a case for each key: the old variant, the new variant
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (OLD["base"], {"scheme": "none"}),
    (
        OLD["int8"],
        {
            "scheme": "W8A8",
            "scaling": "smoothquant",
            "smoothing": 0.5,
            "rounding": "gptq",
            "symmetric_activations": False,
        },
    ),
    (
        GPTQ,
        {
            "scheme": "W4A16_ASYM",
            "rounding": "gptq",
            "group_size": 64,
            "damping": 0.05,
            "clip": True,
            "refine": 1,
        },
    ),
    (
        {**GPTQ, "symmetric": True, "act_order": "none", "damping": 0.01, "skip_layers": [0, 3], "propagate": True},
        {
            "scheme": "W4A16",
            "rounding": "gptq",
            "group_size": 64,
            "act_order": "none",
            "damping": 0.01,
            "clip": True,
            "refine": 1,
            "propagate": True,
            "skip_layers": [0, 3],
        },
    ),
    (
        {**GPTQ, "backend": "llm-compressor", "clip": False, "refine": 0, "samples": 8},
        {
            "scheme": "W4A16_ASYM",
            "rounding": "gptq",
            "backend": "llm-compressor",
            "group_size": 64,
            "damping": 0.05,
            "clip": False,
            "refine": 0,
            "samples": 8,
        },
    ),
    (
        AWQ,
        {
            "scheme": "W4A16_ASYM",
            "scaling": "awq",
            "group_size": 64,
            "clip": True,
            "rounding": "gptq",
            "refine": 1,
            "format": "awq",
        },
    ),
    (
        {**AWQ, "backend": "autoawq", "rounding": "nearest", "refine": 0},
        {
            "scheme": "W4A16_ASYM",
            "scaling": "awq",
            "backend": "autoawq",
            "group_size": 64,
            "clip": True,
            "refine": 0,
            "format": "awq",
        },
    ),
    (
        OLD["auto"],
        {
            "scheme": "mixed",
            "scaling": "awq",
            "clip": True,
            "rounding": "gptq",
            "damping": 0.05,
            "scale_dtype": "float16",
            "bits_per_weight": 4.5,
            "candidates": ["W4A16_ASYM@64", "W4A16_ASYM@128", "W8A16@64", "W8A16@128"],
            "fused": False,
            "refine": 2,
        },
    ),
    ({"method": "gguf", "type": "Q4_K_M", "importance": True}, {"scheme": "Q4_K_M", "imatrix": True}),
    ({"method": "gguf", "type": "Q6_K", "importance": False}, {"scheme": "Q6_K"}),
]


def settings(variant: dict[str, Any]) -> Settings:
    """params.yaml with this variant, for a target that runs it."""
    values = {**PARAMS, "variants": {"base": {"scheme": "none"}, "other": {"scheme": "W8A8"}}}
    if variant.get("scheme", "").startswith("Q"):
        values["targets"] = ["gguf"]
    if variant != {"scheme": "none"}:
        values["variants"]["v"] = variant
    return check_settings(values)


@pytest.mark.parametrize(("old", "new"), CASES)
def test_variant_is_translated(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert new_variant(old) == new
    assert settings(new)


@pytest.mark.parametrize(("old", "new"), CASES)
def test_printed_line_is_valid(old: dict[str, Any], new: dict[str, Any]) -> None:
    values = copy.deepcopy(PARAMS)
    values["variants"]["v"] = old
    with pytest.raises(
        TaskError, match=r"^params\.yaml uses settings of an earlier version; replace them with:\n"
    ) as caught:
        check_settings(values)
    (line,) = str(caught.value).splitlines()[1:]
    key, _, text = line.partition(": ")
    assert key == "variants.v"
    assert yaml.safe_load(text) == new
    assert settings(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("target", "bits", "now"),
    [
        ("transformers", 8, None),
        ("onnx", 8, "W8A16@64"),
        ("onnx", 4, "W4A16_ASYM@32"),
        ("onnx", 32, None),
        ("gguf", 8, "W8A16@32"),
        ("gguf", 32, None),
    ],
)
def test_whole_file_of_that_commit_becomes_valid_line_by_line(target: str, bits: int, now: str | None) -> None:
    """The output layer, formerly quantized by the export, becomes a setting of each of our variants."""
    library = {**AWQ, "backend": "autoawq", "rounding": "nearest", "refine": 0}
    variants = {**OLD, "theirs": library}
    values = {key: value for key, value in PARAMS.items() if key != "targets"} | {
        "variants": variants,
        "target": target,
    }
    values |= {"onnx": {"output_layer": bits}, "gguf": {"output_layer": bits}}
    with pytest.raises(TaskError) as caught:
        check_settings(values)
    lines = dict(line.split(": ", 1) for line in str(caught.value).splitlines()[1:])
    assert list(lines) == [*(f"variants.{name}" for name in variants), "onnx", "gguf", "targets"]
    assert yaml.safe_load(lines["targets"]) == [target]
    assert lines["onnx"].startswith("remove the section; output_layer is now a setting of each variant")
    told = {name: yaml.safe_load(lines[f"variants.{name}"]) for name in variants}
    found = check_settings({**PARAMS, "variants": told, "targets": [target]}).variants
    for name, variant in found.items():
        assert variant.output_layer == (None if name in ("base", "theirs") else now)
    assert found["awq-int4"].format == ("awq" if now is None else "compressed-tensors")
    assert found["awq-int4"].scale_dtype == (None if now is None else "float16")


def test_only_the_old_variant_among_new_ones_is_named() -> None:
    with pytest.raises(TaskError) as caught:
        check_settings({**PARAMS, "variants": {**PARAMS["variants"], "old": GPTQ}})
    assert len(str(caught.value).splitlines()) == 2


def test_record_of_strings_is_translated() -> None:
    """As stored by MLflow."""
    found = new_variant({key: str(value) for key, value in GPTQ.items()} | {"symmetric": "True"})
    assert (found["scheme"], found["group_size"]) == ("W4A16", "64")
    assert new_variant({"method": "gguf", "type": "Q4_K_M", "importance": "False"}) == {"scheme": "Q4_K_M"}
