"""Several targets, and what the stages serve and load found: winner, table, page, model card, overview."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.report import report
from tasks.reporting.columns import Cell, columns, legend, reasons
from tasks.reporting.decision import decisive, figures, next_step
from tasks.reporting.model_card import model_card
from tasks.reporting.overview import fastest, overview
from tasks.reporting.served import failed_to_serve, proof, ratios, under_load
from tasks.reporting.summary import summarize
from tasks.settings import Settings, check_settings, load_settings
from tests.unit.measured import GATE, made_up

CHECKS = [
    {"check": "models", "state": "passed", "detail": "1 model"},
    {"check": "tools", "state": "not offered", "detail": "the template has none"},
]
AGREEMENT = {"texts": 16, "equal": 14, "near_ties": 2, "tokens": 4088, "difference": 0.00061}
SERVED: dict[str, Any] = {
    "state": "served",
    "reason": None,
    "engine": "vLLM",
    "version": "0.32.0",
    "command": ["python", "-m", "server", "--model", "int4"],
    "start_seconds": 71.2,
    "machine": {"processor": "a processor", "cores": 2},
    "findings": CHECKS,
    "agreement": AGREEMENT,
}
REFUSED = {"state": "not served", "reason": "vLLM ended with status 1: no kernel", "engine": "vLLM"}
ELSEWHERE = {"state": "not servable here", "reason": "it needs AMX", "engine": "vLLM"}


def level(concurrency: int, speed: float) -> dict[str, Any]:
    seconds = {"p50": 0.1 * concurrency, "p95": 0.2 * concurrency, "p99": None}
    kinds = ("time_to_first_token", "time_per_token", "gap", "latency")
    return {"concurrency": concurrency, "tokens_per_second": speed, "goodput": 1.5} | dict.fromkeys(kinds, seconds)


def under(speed: float) -> dict[str, Any]:
    tie = speed == 1.0
    ratio = {"mean": speed, "low": speed - 0.1, "high": speed + 0.1, "tie": tie}
    return {
        "main": level(4, 80 * speed),
        "curve": [level(1, 30 * speed), level(2, 50 * speed), level(4, 80 * speed)],
        "saturation": 4,
        "ratios": {"tokens_per_second": ratio},
        "cost": {"price": 1.0, "lowest": 3.4, "within_objective": None},
    }


def variants(smallest: dict[str, Any], **more: Any) -> dict[str, dict[str, Any]]:
    """The smallest that passes has the name int4."""
    found: dict[str, dict[str, Any]] = {
        "base": {"lost": 0, "size": 269_000_000, "serving": SERVED, "load": under(1.0)},
        "int8": {
            "bits": 8,
            "scheme": "W8A8",
            "lost": 0.002,
            "size": 163_000_000,
            "serving": SERVED,
            "load": under(1.4),
        },
        "int4": {"bits": 4, "lost": 0.01, "size": 112_000_000, "serving": smallest, "load": under(1.3)},
    }
    return {name: row | more.get(name, {}) for name, row in found.items()}


def summary_of(root: Path, smallest: dict[str, Any], target: str = "vllm") -> dict[str, Any]:
    made = variants(smallest)
    made_up(root, made, target=target)
    found = summarize(target, list(made), GATE, root / "metrics", root / "results", root / "source.json")
    return {**found, "machine": {}, "versions": {}}


@pytest.fixture
def two() -> Settings:
    values = load_settings(Path("params.yaml")).model_dump(mode="json", exclude_unset=True)
    chosen = {"base": "base", "int8": "int8", "int4": "gptq-int4"}
    values["variants"] = {name: values["variants"][of] for name, of in chosen.items()}
    return check_settings({**values, "targets": ["vllm", "onnx"]}).model_copy(update={"gate": GATE})


@pytest.mark.parametrize(
    ("smallest", "winner"), [(SERVED, "int4"), (REFUSED, "int8"), (ELSEWHERE, "int4")], ids=lambda one: str(one)[:20]
)
def test_a_variant_that_is_not_served_cannot_win(tmp_path: Path, smallest: dict[str, Any], winner: str) -> None:
    summary = summary_of(tmp_path, smallest)
    assert summary["variants"]["int4"]["verdict"] == "pass"
    assert failed_to_serve(summary["variants"]["int4"]) == (smallest is REFUSED)
    assert summary["winner"] == winner
    assert decisive(summary)["variants"]["int4"]["served"] == smallest["state"]


def test_why_it_was_not_served_stands_in_every_output(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, REFUSED)
    (column,) = (one for one in columns(summary) if one.heading == "served")
    assert {name: cell.text for name, cell in column.cells.items()} == {
        "base": "served",
        "int8": "served",
        "int4": "not served",
    }
    assert "Not served: vLLM ended with status 1: no kernel." in reasons(summary)["int4"]
    for row in summary["variants"].values():
        row["serving"] = REFUSED
    assert "find out why int8, which passes its gate, was not served" in next_step({**summary, "winner": None})


def test_a_target_without_a_server_has_no_such_column(tmp_path: Path) -> None:
    made_up(tmp_path, {name: row | {"serving": {}, "load": None} for name, row in variants(SERVED).items()})
    folders = tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json"
    summary = summarize("transformers", ["base", "int8", "int4"], GATE, *folders)
    assert "served" not in [column.heading for column in columns(summary)]
    assert "served" not in [one.label for one in figures(summary)]
    assert "decode\nspeed" in [column.heading for column in columns(summary)]


def test_the_speed_of_a_served_variant_is_what_its_clients_get(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, SERVED)
    summary["variants"]["int8"] |= {
        "load": None,
        "speed": {"decode_ratio": None, "fast_kernel": False, "note": "it needs AMX"},
    }
    (column,) = (one for one in columns(summary) if one.heading == "tokens/s\nunder load")
    assert column.cells == {
        "base": Cell("1.00x"),
        "int8": Cell("not\nmeasured", remark="it needs AMX"),
        "int4": Cell("1.30x", remark="1.30 (1.20 to 1.40)"),
    }
    assert legend(summary).startswith(
        "Tokens/s under load: of the server with 4 requests at once, relative to the baseline's. Retention"
    )
    assert [row["throughput_ratio"] for row in decisive(summary)["variants"].values()] == [1.0, None, 1.3]
    assert "decode\nspeed" not in [one.heading for one in columns(summary)]


def test_what_was_proven_is_counted() -> None:
    assert proof(SERVED) == (
        "1 checks passed; 1 not offered by the server; 14 of 16 greedy texts as evaluated, 2 more up to a near-tie; "
        "mean log-probability of 4,088 tokens +0.00061 nats from the evaluation's"
    )
    assert proof(ELSEWHERE) == "it needs AMX"


def test_figures_under_load_have_their_units_and_ties_are_said() -> None:
    found = dict(under_load(under(1.0)))
    assert found["time to first token, p50 and p95"] == "400 and 800 ms"
    assert found["doubling adds 5% or less from"] == "4 requests at once"
    assert ratios(under(1.0)) == {"tokens per second": "1.00 (0.90 to 1.10), a tie"}
    assert ratios(under(1.4)) == {"tokens per second": "1.40 (1.30 to 1.50)"}


def test_the_card_says_what_was_served_with_which_command_and_how_fast(tmp_path: Path, two: Settings) -> None:
    card = model_card("bundle", summary_of(tmp_path, SERVED), two, [], "compressed-tensors", "AutoModelForCausalLM")
    assert "Served by vLLM 0.32.0 on a processor: 1 checks passed" in card
    assert "```sh\npython -m server --model int4\n```" in card
    assert "tokens per second: 104.0" in card
    assert "tokens per second 1.30 (1.20 to 1.40)" in card
    card = model_card("bundle", summary_of(tmp_path / "b", ELSEWHERE), two, [], "awq", "AutoModelForCausalLM")
    assert "Not servable here: it needs AMX." in card


def test_each_target_has_its_own_files_and_the_first_page_compares_them(tmp_path: Path, two: Settings) -> None:
    for target, smallest in (("vllm", REFUSED), ("onnx", SERVED)):
        made_up(tmp_path, variants(smallest), target=target)
    done = report(two, tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json", tmp_path / "report")
    assert {target: found["winner"] for target, found in done.decisive.items()} == {"vllm": "int8", "onnx": "int4"}
    names = {path.relative_to(tmp_path / "report").as_posix() for path in (tmp_path / "report").rglob("*.*")}
    assert names >= {
        *(f"{target}/{name}" for target in two.targets for name in ("summary.json", "index.html", "completions.md")),
        *(f"plots/{target}{what}.png" for target in two.targets for what in ("", "-latency")),
    }
    first = (tmp_path / "report/index.html").read_text()
    assert "2 of 2 targets have a winner" in first
    assert 'href="onnx/index.html"' in first
    own = (tmp_path / "report/vllm/index.html").read_text()
    assert "vLLM ended with status 1: no kernel" in own
    assert "Median latency over tokens per second" in own
    summaries: dict[str, Any] = {
        t: json.loads((tmp_path / f"report/{t}/summary.json").read_text()) for t in two.targets
    }
    names_of_rows, *by_target = overview(summaries)
    assert [column.heading for column in by_target] == ["vllm", "onnx"]
    assert {"winner", "size", "retention", "served"} <= set(names_of_rows.cells)
    assert by_target[1].cells["winner"].text == "int4"
    assert fastest(summaries).endswith(
        "with 4 requests at once, vllm is the fastest (tokens per second: vllm 112.0, onnx 104.0)."
    )
    assert done.table.index("onnx\n----") > done.table.index("vllm\n----")
