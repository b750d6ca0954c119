"""Where stages run: in threads of this process, or on the workers of a Dask or Ray cluster.

modelpress run --runner dask                                     # a cluster of processes on this machine
modelpress run --runner dask --cluster tcp://scheduler:8786      # one that is there

It says where, not what: results are the same bytes, so it is no part of params.yaml.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.errors import FlowError

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner

RUNNER_ENV = "MODELPRESS_RUNNER"
CLUSTER_ENV = "MODELPRESS_CLUSTER"
SPACE = Path(".modelpress/dask")  # where local workers keep what they write for themselves


class RunnerName(str, Enum):  # noqa: UP042 - a StrEnum is no drop-down in Prefect's form
    """The kinds of task runners."""

    threads = "threads"
    dask = "dask"
    ray = "ray"


@dataclass(frozen=True)
class Executor:
    """Where stages run. cluster: the address of one that is there; None: one is started for this run."""

    runner: RunnerName = RunnerName.threads
    cluster: str | None = None

    def __post_init__(self) -> None:
        if self.cluster and self.runner is RunnerName.threads:
            raise FlowError(
                f"found the cluster {self.cluster} with the runner threads, which needs none; add --runner dask or "
                f"--runner ray ({RUNNER_ENV}), or leave the cluster out"
            )

    @property
    def elsewhere(self) -> bool:
        """Whether stages run in other processes than the flow's."""
        return self.runner is not RunnerName.threads


def executor_of(runner: RunnerName | None) -> Executor:
    """The choice of a person, or where there is none that of the environment, in which the address always stands.

    An address is never taken from a browser: a cluster sends back objects that run code when they are read.
    """
    named = os.environ.get(RUNNER_ENV) or RunnerName.threads.value
    try:
        chosen = runner or RunnerName(named)
    except ValueError:
        names = ", ".join(name.value for name in RunnerName)
        raise FlowError(f"{RUNNER_ENV} is {named}; expected one of {names}; set one of them") from None
    # the environment's cluster belongs to the environment's runner: Dask and Ray do not understand each other
    return Executor(chosen, (os.environ.get(CLUSTER_ENV) or None) if chosen.value == named else None)


def task_runner(executor: Executor, workers: int, root: Path) -> TaskRunner[Any]:
    """A Prefect task runner for this place; where no cluster is named, its own has `workers` processes.

    Nothing is started before the first stage is submitted. FlowError if the extra is not installed.
    """
    if executor.runner is RunnerName.dask:
        return _dask(executor.cluster, workers, root)
    if executor.runner is RunnerName.ray:
        return _ray(executor.cluster, workers)
    from prefect.task_runners import ThreadPoolTaskRunner

    return ThreadPoolTaskRunner()


def _dask(cluster: str | None, workers: int, root: Path) -> TaskRunner[Any]:
    try:
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError as error:
        raise _missing("dask", error) from error
    if cluster:
        return DaskTaskRunner(address=cluster)
    space = root / SPACE
    space.mkdir(parents=True, exist_ok=True)
    options = {
        "n_workers": workers,
        "threads_per_worker": 1,
        "processes": True,
        "host": "127.0.0.1",
        "dashboard_address": None,
        "memory_limit": 0,  # a worker only waits for a stage, whose memory Dask does not see
        "local_directory": str(space),
        "security": True,  # whoever reaches a scheduler runs code as us: let nobody else on this machine in
        "preload": "flows.execution.dask_worker",
    }
    return DaskTaskRunner(cluster_kwargs=options)


def _ray(cluster: str | None, workers: int) -> TaskRunner[Any]:
    try:
        import ray  # noqa: F401 - prefect-ray imports it late and then fails in the middle of a run
        from prefect_ray.task_runners import RayTaskRunner
    except ImportError as error:
        raise _missing("ray", error) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    where = {"address": cluster} if cluster else {"init_kwargs": {"num_cpus": workers, "include_dashboard": False}}
    runner: TaskRunner[Any] = RayTaskRunner(**where)
    return runner


def _missing(extra: str, error: ImportError) -> FlowError:
    return FlowError(
        f"--runner {extra} needs a library that is not installed ({error}); run `pip install 'modelpress[{extra}]'`, "
        f"in a clone `.venv/bin/pip install -e '.[{extra}]'`"
    )
