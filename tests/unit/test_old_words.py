"""Records from before variants had a scheme, translated into the current keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.tracking.result_markdown import result
from tasks.old_words import new_record
from tasks.report import report
from tasks.reporting.columns import columns
from tasks.reporting.summary import summarize
from tasks.reporting.table import table
from tasks.settings import load_settings
from tests.unit.measured import GATE, made_up

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"lost": 0, "size": 269_000_000},
    "int8": {"scheme": "W8A8", "bits": 8, "lost": 0.002, "size": 163_000_000, "worse": 0.006},
    "gptq-int4": {"bits": 4, "lost": 0.015, "size": 112_000_000, "worse": 0.2},
    "awq-int4": {"bits": 4, "lost": 0.2, "size": 111_000_000, "worse": 0.25},
    "auto": {"scheme": "mixed", "bits": 4, "lost": 0.01, "size": 115_000_000, "worse": 0.1},
}
METHODS = dict(zip(VARIANTS, ("none", "int8", "gptq", "awq", "auto"), strict=True))
SCHEMES = dict(zip(VARIANTS, ("none", "W8A8", "W4A16 or W4A16_ASYM", "W4A16_ASYM", "mixed"), strict=True))
LABELS = {"W4A16_ASYM@64": "4@64", "W8A8": "8@64"}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """metrics/quantize as commit 7e53a78 wrote it; the other metrics had their current form."""
    made_up(tmp_path, VARIANTS)
    for name, method in METHODS.items():
        path = tmp_path / f"metrics/quantize/{name}.json"
        text = path.read_text()
        for label, before in LABELS.items():
            text = text.replace(f'"{label}"', f'"{before}"')
        values = json.loads(text)
        for key in ("scheme", "recipe", "format", "output_layer", "output_layer_error"):
            del values[key]
        path.write_text(json.dumps(values | {"method": method}))
    return tmp_path


def test_old_metrics_make_a_report_in_new_words(old: Path) -> None:
    settings = load_settings(Path("params.yaml")).model_copy(update={"gate": GATE})
    report(settings, old / "metrics", old / "results", old / "source.json", old / "report")
    rows = json.loads((old / "report/transformers/summary.json").read_text())["variants"]
    assert {name: row["scheme"] for name, row in rows.items()} == SCHEMES
    assert {name: row["backend"] for name, row in rows.items()} == dict.fromkeys(VARIANTS, "modelpress") | {
        "base": "none"
    }
    assert "W8A8, 8.31 bits per weight" in " ".join((old / "report/index.html").read_text().split())
    assert "Where auto needs precision" in (old / "report/index.html").read_text()


def test_an_old_summary_is_shown(old: Path) -> None:
    summary = summarize("transformers", list(VARIANTS), GATE, old / "metrics", old / "results", old / "source.json")
    for name, row in summary["variants"].items():  # unchanged
        row |= {"method": METHODS[name]}
        for key in ("scheme", "recipe", "format", "backend", "output_layer"):
            del row[key]
    remarks = {name: cell.remark for name, cell in columns(summary)[0].cells.items()}
    bits = {name: f", {row['bits']}.31 bits per weight" for name, row in VARIANTS.items() if name != "base"}
    assert remarks == {"base": "baseline"} | {name: SCHEMES[name] + bits[name] for name in bits}
    (line,) = (line for line in result(summary, "").splitlines() if line.startswith("| int8 "))
    assert line.split("|")[2].strip() == "163 MB"
    assert "int8: pass, " in table(summary)


def test_precisions_and_what_is_new_are_as_in_todays_records() -> None:
    linears = [{"name": "model.layers.0.mlp.up_proj", "chosen": "8@128", "costs": {"4@64": 0.1, "8@128": 0.0}}]
    found = new_record({"method": "auto", "bits": 4, "linears": linears})
    assert found["linears"] == [
        {
            "name": "model.layers.0.mlp.up_proj",
            "chosen": "W8A16@128",
            "costs": {"W4A16_ASYM@64": 0.1, "W8A16@128": 0.0},
        }
    ]
    assert (found["bits"], found["recipe"], found["output_layer"]) == (4, "", None)
    assert "method" not in found
    today = {"scheme": "W8A8", "recipe": "GPTQ", "linears": []}
    assert new_record(today) == today


@pytest.mark.parametrize(
    ("record", "scheme"),
    [
        ({"method": "none"}, "none"),
        ({"method": "gptq", "symmetric": "true"}, "W4A16"),
        ({"method": "gptq", "symmetric": "false", "group_size": "64"}, "W4A16_ASYM"),
        ({"method": "gptq", "bits": 4}, "W4A16 or W4A16_ASYM"),  # not in the file
        ({"method": "gguf", "type": "Q6_K", "importance": "true"}, "Q6_K"),
        ({"method": "gguf", "bits": 5}, "Q5_K_M"),
        ({"method": "awq", "rounding": "nearest"}, "W4A16_ASYM"),
        ({"method": "auto", "candidates": '["4@64", "8@64"]', "propagate": "false"}, "mixed"),
    ],
)
def test_the_scheme_is_told_by_metrics_and_by_mlflows_parameters(record: dict[str, Any], scheme: str) -> None:
    assert new_record(record)["scheme"] == scheme
