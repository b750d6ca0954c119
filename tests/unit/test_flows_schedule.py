from __future__ import annotations

import pytest

from flows.graph.schedule import doomed, startable, threads_of

GRAPH = {
    "download": (),
    "quantize@a": ("download",),
    "quantize@b": ("download",),
    "evaluate@a": ("quantize@a",),
    "load@a": ("quantize@a",),
    "load@b": ("quantize@b",),
    "report": ("evaluate@a", "load@a", "load@b"),
}


def test_a_stage_starts_when_its_upstreams_are_done() -> None:
    assert startable(GRAPH, set(), set(), jobs=4) == ["download"]
    assert startable(GRAPH, set(), {"download"}, jobs=4) == []
    assert startable(GRAPH, {"download"}, set(), jobs=4) == ["quantize@a", "quantize@b"]


def test_no_more_than_jobs_run() -> None:
    assert startable(GRAPH, {"download"}, set(), jobs=1) == ["quantize@a"]
    assert startable(GRAPH, {"download"}, {"quantize@a"}, jobs=1) == []
    assert startable(GRAPH, {"download"}, {"quantize@a"}, jobs=2) == ["quantize@b"]


def test_loads_wait_for_everything_else_and_run_one_at_a_time() -> None:
    done = {"download", "quantize@a"}
    assert startable(GRAPH, done, {"quantize@b"}, jobs=4) == ["evaluate@a"]
    done |= {"quantize@b"}
    assert startable(GRAPH, done, {"evaluate@a"}, jobs=4) == []
    done |= {"evaluate@a"}
    assert startable(GRAPH, done, set(), jobs=4) == ["load@a"]
    assert startable(GRAPH, done, {"load@a"}, jobs=4) == []
    assert startable(GRAPH, done | {"load@a"}, set(), jobs=4) == ["load@b"]
    assert startable(GRAPH, done | {"load@a", "load@b"}, set(), jobs=4) == ["report"]


def test_only_stages_after_a_failed_one_are_skipped() -> None:
    assert doomed(GRAPH, {"quantize@a"}) == ["evaluate@a", "load@a", "report"]
    assert doomed(GRAPH, {"report"}) == []


@pytest.mark.parametrize(
    ("stage", "starting", "running", "jobs", "cores", "threads"),
    [
        ("statistics", ["statistics"], [], 2, 2, 2),
        ("evaluate@a", ["evaluate@a", "evaluate@b"], [], 2, 2, 1),
        ("evaluate@a", ["evaluate@a", "evaluate@b"], [], 2, 64, 32),
        ("evaluate@a", ["evaluate@a"], ["evaluate@b"], 2, 2, 1),
        ("evaluate@a", ["evaluate@a", "evaluate@b"], [], 4, 2, 1),
        ("evaluate@a", ["evaluate@a"], [], 4, 2, 2),
        ("load@a", ["load@a"], [], 2, 2, 2),
    ],
)
def test_parallel_stages_share_the_cores(
    stage: str, starting: list[str], running: list[str], jobs: int, cores: int, threads: int
) -> None:
    assert threads_of(stage, starting, running, jobs, cores) == threads
