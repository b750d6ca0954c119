"""A run on paper: the flow's own order, what is held at one time, and what is said of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.errors import FlowError
from flows.graph.schedule import runs_alone
from flows.planning import simulate as scales
from flows.planning.simulate import RunEstimate, read_model, read_or_measure, simulate
from flows.planning.table import duration, lines
from tasks.planning.machine import Machine, check_machine, read_machine, write_machine
from tasks.planning.shape import read_shape
from tests.unit.test_estimate import QUIET, SETTINGS, SMOLLM2
from tests.unit.test_shape import LLAMA_2_7B, MIXTRAL_8X7B

VARIANTS = ("base", "int8", "gptq-int4", "awq-int4", "auto")
GRAPH: dict[str, list[str]] = {
    "download": [],
    "calibrate": ["download"],
    "statistics": ["calibrate"],
    **{f"quantize@{name}": ["statistics"] for name in VARIANTS},
    **{f"evaluate@{name}": [f"quantize@{name}"] for name in VARIANTS},
    **{f"benchmark@{name}": [f"quantize@{name}"] for name in VARIANTS},
    "report": [f"{kind}@{name}" for kind in ("evaluate", "benchmark") for name in VARIANTS],
}


def planned(config: dict[str, Any], machine: Machine = QUIET, jobs: int = 2) -> RunEstimate:
    return simulate(GRAPH, read_shape(config, "here"), SETTINGS, machine, jobs)


def printed(config: dict[str, Any], machine: Machine = QUIET, jobs: int = 2) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    shape = read_shape(config, "here")
    for part in lines(planned(config, machine, jobs), shape, SETTINGS, machine, jobs):
        console.print(part, soft_wrap=isinstance(part, str))
    return console.export_text()


def ends(found: RunEstimate) -> dict[str, float]:
    return {stage: found.begins[stage] + (need.seconds or 0.0) for stage, need in found.needs.items()}


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_the_run_is_in_the_order_of_the_flow(jobs: int) -> None:
    found = planned(SMOLLM2, jobs=jobs)
    end = ends(found)
    assert set(found.begins) == set(GRAPH)
    assert all(found.begins[stage] >= end[need] for stage, needs in GRAPH.items() for need in needs)
    for stage, begin in found.begins.items():
        beside = [other for other in GRAPH if other != stage and found.begins[other] <= begin < end[other]]
        assert len(beside) < jobs
        assert not (beside and any(runs_alone(one) for one in (stage, *beside)))
    assert found.seconds == max(end.values())


def test_the_demo_took_what_is_estimated() -> None:
    # `make demo` on two cores, from its first stage to its last
    found = planned(SMOLLM2)
    assert found.seconds == pytest.approx(948, rel=0.3)


def test_the_memory_is_of_the_stages_that_run_together() -> None:
    one, two = (planned(SMOLLM2, jobs=jobs) for jobs in (1, 2))
    assert one.memory == max(need.memory or 0 for need in one.needs.values())
    assert len(two.together) == 2
    assert two.memory == sum(two.needs[stage].memory or 0 for stage in two.together)
    assert one.memory < two.memory <= 2 * one.memory
    assert one.disk == two.disk == sum(need.disk for need in one.needs.values())


def test_the_threads_are_those_that_the_flow_gives() -> None:
    one, two = (planned(SMOLLM2, jobs=jobs) for jobs in (1, 2))
    assert one.needs["statistics"] == two.needs["statistics"]
    assert (one.needs["evaluate@base"].seconds or 0) < (two.needs["evaluate@base"].seconds or 0)


def test_what_does_not_fit_is_said_with_both_figures() -> None:
    small = check_machine(QUIET.model_dump() | {"memory_gb": 24, "disk_gb": 20}, "here")
    text = printed(LLAMA_2_7B, small)
    assert "needs 41.2 GB, this machine has 24.0 GB" in text
    assert "does not fit, this machine has 24.0 GB" in text
    assert "does not fit, 20.0 GB are free" in text
    assert "does not fit" not in printed(SMOLLM2)
    found = planned(SMOLLM2)
    between = (found.memory + max(need.memory or 0 for need in found.needs.values())) / 2e9
    narrow = check_machine(QUIET.model_dump() | {"memory_gb": between}, "here")
    assert "fits with --jobs 1 only" in printed(SMOLLM2, narrow)
    assert ": fits\n" in printed(SMOLLM2, narrow, jobs=1)


def test_a_family_that_is_not_pressed_yet_is_named_as_such() -> None:
    assert "refuses the family mixtral today" in printed(MIXTRAL_8X7B)
    assert "refuses" not in printed(LLAMA_2_7B)


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (89, "89 s"), (90, "2 min"), (6000, "1.7 h"), (3 * 86400, "3.0 days")]
)
def test_a_duration_reads_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_model_is_a_config_or_a_folder_with_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    shapes = [read_model(tmp_path, str(place)) for place in (tmp_path, tmp_path / "config.json", f"path:{tmp_path}")]
    assert shapes[0] == shapes[1] == shapes[2] == read_shape(LLAMA_2_7B, "here")


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "no model's config.json"), ("[]", "holds list"), ("{}", "type None"), (None, "is not there; name a config")],
)
def test_what_is_no_model_is_one_clear_error(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(FlowError, match=words):
        read_model(tmp_path, str(tmp_path))


def test_this_machine_is_measured_once_and_again_when_asked_or_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Path] = []
    here = check_machine(QUIET.model_dump() | {"cores": scales.cores_here()}, "here")

    def measure(root: Path) -> Machine:
        measured.append(root)
        return here

    monkeypatch.setattr(scales, "measure", measure)
    assert read_or_measure(tmp_path, None, False, {}) == here
    assert read_or_measure(tmp_path, None, False, {}) == here
    assert len(measured) == 1
    read_or_measure(tmp_path, None, True, {})
    assert len(measured) == 2
    kept = next((tmp_path / scales.MACHINES).iterdir())
    write_machine(kept, check_machine(here.model_dump() | {"cores": here.cores + 1}, "here"))
    read_or_measure(tmp_path, None, False, {})
    kept.write_text("written by another version: 1")
    read_or_measure(tmp_path, None, False, {})
    assert len(measured) == 4


def test_a_figure_that_was_not_measured_is_called_given(tmp_path: Path) -> None:
    write_machine(tmp_path / "server.yaml", QUIET)
    found = read_or_measure(tmp_path, tmp_path / "server.yaml", False, {"memory_gb": 512.0, "disk_gb": None})
    assert found.memory_gb == 512
    assert found.source.endswith("given: memory_gb")
    assert found.disk_gb == QUIET.disk_gb
    with pytest.raises(FlowError, match="is no readable YAML"):
        read_or_measure(tmp_path, tmp_path / "nowhere.yaml", False, {})


def test_the_example_in_the_documentation_is_a_machine(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/plan.md").read_text(encoding="utf-8")
    (tmp_path / "server.yaml").write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    assert read_machine(tmp_path / "server.yaml").source.startswith("measured ")
