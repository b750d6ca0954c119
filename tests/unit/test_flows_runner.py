"""The task runner: choice, environment and the error for a missing library; the heartbeat."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flows.errors import FlowError
from flows.execution import heartbeat
from flows.execution.heartbeat import LOOKS, beating, gone
from flows.execution.runner import CLUSTER_ENV, RUNNER_ENV, Executor, RunnerName, executor_of, task_runner


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUNNER_ENV, raising=False)
    monkeypatch.delenv(CLUSTER_ENV, raising=False)


def test_threads_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert executor_of(None) == Executor()
    monkeypatch.setenv(RUNNER_ENV, "dask")
    monkeypatch.setenv(CLUSTER_ENV, "tcp://scheduler:8786")
    assert executor_of(None) == Executor(RunnerName.dask, "tcp://scheduler:8786")
    # the address is only for Dask
    assert executor_of(RunnerName.ray) == Executor(RunnerName.ray)
    assert executor_of(RunnerName.threads) == Executor()


def test_incompatible_choices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FlowError, match=r"found the cluster tcp://x with the runner threads.*--runner dask"):
        Executor(cluster="tcp://x")
    monkeypatch.setenv(RUNNER_ENV, "slurm")
    with pytest.raises(FlowError, match="MODELPRESS_RUNNER is slurm; expected one of threads, dask, ray"):
        executor_of(None)


@pytest.mark.parametrize(
    ("runner", "module"), [(RunnerName.dask, "prefect_dask.task_runners"), (RunnerName.ray, "ray")]
)
def test_missing_extra_names_the_install_command(
    runner: RunnerName, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FlowError, match=rf"pip install 'modelpress\[{runner.value}\]'"):
        task_runner(Executor(runner), 2, tmp_path)


def test_heartbeat_is_fresh_while_the_body_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LOOK", 0.0)
    with beating(tmp_path, "run") as path:
        is_gone = gone(path)
        assert not is_gone()
    assert is_gone()


def test_stale_heartbeat_counts_as_gone_after_many_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LOOK", 0.0)
    path = tmp_path / "run"
    path.write_text("7")
    is_gone = gone(path)
    assert [is_gone() for _ in range(LOOKS)] == [False] * LOOKS
    assert is_gone()
    path.write_text("8")
    assert not is_gone()


def test_new_run_removes_the_heartbeat_of_a_killed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LOOK", 0.0)
    left = tmp_path / heartbeat.PULSES / "killed"
    left.parent.mkdir(parents=True)
    left.write_text("7")
    with beating(tmp_path, "run"):
        assert gone(left)()
