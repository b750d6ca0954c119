"""The result page in Prefect's UI shows every figure of the summary."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from flows.tracking.result_markdown import result
from tasks.reporting.completions import LEGEND
from tasks.reporting.summary import summarize
from tests.unit.measured import GATE, made_up

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"lost": 0, "size": 269_000_000},
    "int8": {"scheme": "W8A8", "bits": 8, "lost": 0.002, "size": 163_000_000, "worse": 0.006, "speed": 1.1},
    "awq-int4": {"format": "awq", "bits": 4, "lost": 0.2, "size": 111_000_000, "worse": 0.25, "speed": None},
}


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    """The summary of fake measurements, created by the code of the stage `report`."""
    made_up(tmp_path, VARIANTS)
    return summarize(
        "transformers", list(VARIANTS), GATE, tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json"
    )


def table_of(page: str) -> dict[str, list[str]]:
    """Row name -> its other cells; all rows have the same width."""
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {len(rows[0])}
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in rows}


def test_the_table_has_every_figure(summary: dict[str, Any]) -> None:
    table = table_of(result(summary, ""))
    kept = summary["variants"]["int8"]["retention"]
    assert table["variant"][3:5] == ["items", "retention in % (95% interval)"]
    assert table["variant"][5:7] == ["perplexity, medical", "perplexity, news"]
    assert table["base"] == ["269 MB", "1.00x", "1.00x", "800", "100.0", "15.20", "27.44", "", "", "baseline"]
    assert table["int8"] == [
        *("163 MB", "1.65x", "1.10x", "800"),
        f"{100 * kept['mean']:.1f} ({100 * kept['low']:.1f} to {100 * kept['high']:.1f})",
        *("15.29 (+0.6%)", "27.60 (+0.6%)", "0.003", "99.4%", "pass"),
    ]
    assert table["awq-int4"][2] == "no fast kernel"
    assert table["awq-int4"][-1] == "fail"


def test_the_decision_comes_first_and_the_rest_in_this_order(summary: dict[str, Any]) -> None:
    page = result(summary, "![the plot](x)")
    kept = summary["variants"]["int8"]["retention"]
    found = [
        "# int8 passes its gate",
        "**Winner: int8, the smallest that passes (163 MB, 1.65x smaller than the baseline).**",
        "- weights: **8.31 bits** (W8A8: GPTQ)",
        "- size: **163 MB** (1.65x smaller than the baseline's 269 MB)",
        f"- retention: **{100 * kept['mean']:.1f}%** (95% interval ",
        "- decode speed: **1.10x** (of the baseline's, 45.1 tokens/s in transformers 5.17.0 on cpu)",
        "Next: try int8 on your own tasks, then deploy the bundle in dist/.",
        "| awq-int4 ",
        f"- **int8**: pass, {summary['variants']['int8']['reason']}.",
        f"- **awq-int4**: fail, {summary['variants']['awq-int4']['reason']}.",
        "![the plot](x)",
        summary["notes"][0],
        "## The same prompts, continued",
        "- int8 writes 1 of 5 texts as the baseline does",
        "### ` Prompt <0>, ↵ then `",
        "- **awq-int4**, parts at once: ` other900",
        "### ` Prompt <2>, ↵ then `",
        "2 more prompts are in report/index.html.",
        f"Evaluation contract `{summary['contract_hash']}`",
    ]
    assert sorted(found, key=page.index) == found
    assert "- **base**:" in page.partition("## The same prompts")[2]
    # only the contract's hash
    assert "lm-eval" not in page
    assert max(len(line) for line in page.splitlines() if line not in (*summary["notes"], LEGEND)) < 200


def test_missing_winner_is_stated(summary: dict[str, Any]) -> None:
    assert "nothing will be packaged" in result({**summary, "winner": None}, "")


def test_parts_missing_in_a_custom_report_are_empty() -> None:
    page = result({"variants": {"base": {}, "int8": {"verdict": "pass"}}, "winner": "int8"}, "")
    assert table_of(page)["int8"] == [*[""] * 7, "pass"]
    assert re.search(r"\n\n\n", page) is None
