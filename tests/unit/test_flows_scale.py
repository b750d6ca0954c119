"""A run on paper: the flow's own order, what is held at one time, and what is said of what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from rich.console import Console

from flows.graph.schedule import runs_alone
from flows.planning.simulate import RunEstimate, simulate
from flows.planning.table import duration, lines, size
from tasks.planning.need import Need
from tests.unit.test_planning import HERE

VARIANTS = ("base", "int8", "gptq-int4", "awq-int4", "auto")
GRAPH: dict[str, list[str]] = {
    "download": [],
    "calibrate": ["download"],
    "statistics": ["calibrate"],
    **{f"quantize@{name}": ["statistics"] for name in VARIANTS},
    **{f"evaluate@{name}": [f"quantize@{name}"] for name in VARIANTS},
    **{f"load@{name}": [f"quantize@{name}"] for name in VARIANTS},
    "report": [f"{kind}@{name}" for kind in ("evaluate", "load") for name in VARIANTS],
}
NEEDS = {
    stage: Need(20.0 + 7 * number, 1e9 * (1 + number % 3), disk=1e8, scratch=2e8 if "quantize" in stage else 0.0)
    for number, stage in enumerate(GRAPH)
}
MEASURED = replace(HERE, needs=NEEDS)


def ends(found: RunEstimate) -> dict[str, float]:
    return {stage: begin + (NEEDS[stage].seconds or 0.0) for stage, begin in found.begins.items()}


def printed(memory: float = 24e9, disk: float = 50e9, jobs: int = 2, changes: Mapping[str, Need] | None = None) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    measured = replace(MEASURED, memory=memory, disk=disk, needs={**NEEDS, **(changes or {})})
    for part in lines(simulate(GRAPH, measured.needs, jobs), measured, jobs):
        console.print(part, soft_wrap=isinstance(part, str))
    return console.export_text()


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_the_run_is_in_the_order_of_the_flow(jobs: int) -> None:
    found = simulate(GRAPH, NEEDS, jobs)
    end = ends(found)
    assert set(found.begins) == set(GRAPH)
    assert all(found.begins[stage] >= end[need] for stage, needs in GRAPH.items() for need in needs)
    for stage, begin in found.begins.items():
        beside = [other for other in GRAPH if other != stage and found.begins[other] <= begin < end[other]]
        assert len(beside) < jobs
        assert not (beside and any(runs_alone(one) for one in (stage, *beside)))
    assert found.seconds == max(end.values())


def test_the_memory_is_of_the_stages_that_run_together() -> None:
    one, two = (simulate(GRAPH, NEEDS, jobs) for jobs in (1, 2))
    assert one.memory == max(need.memory for need in NEEDS.values())
    assert len(two.together) == 2
    assert two.memory == sum(NEEDS[stage].memory for stage in two.together)
    assert one.memory < two.memory <= 2 * one.memory
    assert one.disk == two.disk == 1e8 * len(NEEDS)
    assert (one.scratch, two.scratch) == (2e8, 4e8)


def test_stages_are_listed_in_the_order_in_which_they_start() -> None:
    begins = simulate(GRAPH, NEEDS, 2).begins
    rows = [line.split()[0] for line in printed().splitlines() if line.split()[:1] and line.split()[0] in GRAPH]
    assert rows == sorted(GRAPH, key=begins.__getitem__)


def test_what_does_not_fit_is_said_with_both_figures() -> None:
    text = printed(memory=2.5e9, disk=1e9)
    assert "needs 3.0 GB, this machine has 2.5 GB" in text
    assert "does not fit: this machine has 2.5 GB" in text
    assert "does not fit: 1.0 GB are free" in text
    assert "does not fit" not in printed()
    assert "fits with --jobs 1 only" in printed(memory=3.5e9)
    assert ": fits\n" in printed(memory=3.5e9, jobs=1)


def test_a_rough_time_and_one_that_is_not_known_are_marked() -> None:
    assert "rough" not in printed()
    rough = replace(NEEDS["quantize@int8"], rough=True)
    unknown = replace(NEEDS["report"], seconds=None, note="no time was left")
    text = printed(changes={"quantize@int8": rough, "report": unknown})
    marked = {line.split()[0]: line for line in text.splitlines() if "rough" in line}
    assert set(marked) == {"quantize@int8", "time"}
    assert ", without report; rough: extrapolated" in marked["time"]
    assert "no time was left" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (89, "89 s"), (90, "2 min"), (6000, "1.7 h"), (3 * 86400, "3.0 days")]
)
def test_a_duration_reads_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(5e6, "5 MB"), (1.24e9, "1.2 GB"), (1.2e12, "1.20 TB")])
def test_a_size_reads_well(count: float, text: str) -> None:
    assert size(count) == text
