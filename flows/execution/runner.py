"""The task runner for stages: threads of this process, or workers of a Dask or Ray cluster.

modelpress run --runner dask                                     # a cluster of processes on this machine
modelpress run --runner dask --cluster tcp://scheduler:8786      # an existing cluster

The runner does not change the bytes of the results, so it is not part of params.yaml.
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
SPACE = Path(".modelpress/dask")  # temporary files of local workers


class RunnerName(str, Enum):  # noqa: UP042 - Prefect's form shows no drop-down for a StrEnum
    """The kinds of task runners."""

    threads = "threads"
    dask = "dask"
    ray = "ray"


@dataclass(frozen=True)
class Executor:
    """The runner and cluster for stages. cluster: the address of an existing one; None: start one for this run."""

    runner: RunnerName = RunnerName.threads
    cluster: str | None = None

    def __post_init__(self) -> None:
        if self.cluster and self.runner is RunnerName.threads:
            raise FlowError(
                f"found the cluster {self.cluster} with the runner threads, which does not use one; add --runner dask "
                f"or --runner ray ({RUNNER_ENV}), or remove the cluster"
            )

    @property
    def elsewhere(self) -> bool:
        """Whether stages run outside the flow's process."""
        return self.runner is not RunnerName.threads


def executor_of(runner: RunnerName | None) -> Executor:
    """The user's choice, or else the environment's. The cluster's address always comes from the environment.

    An address is never accepted from a browser: unpickling the objects that a cluster returns can run code.
    """
    named = os.environ.get(RUNNER_ENV) or RunnerName.threads.value
    try:
        chosen = runner or RunnerName(named)
    except ValueError:
        names = ", ".join(name.value for name in RunnerName)
        raise FlowError(f"{RUNNER_ENV} is {named}; expected one of {names}") from None
    # the environment's cluster is only for the environment's runner: Dask and Ray are incompatible
    return Executor(chosen, (os.environ.get(CLUSTER_ENV) or None) if chosen.value == named else None)


def task_runner(executor: Executor, workers: int, root: Path) -> TaskRunner[Any]:
    """Create a Prefect task runner; without an existing cluster, a local one with `workers` processes.

    Starts nothing before the first stage is submitted. FlowError if the extra is not installed.
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
        "memory_limit": 0,  # Dask does not see the memory of the stage's process
        "local_directory": str(space),
        "security": True,  # whoever can access the scheduler can run code as this user
        "preload": "flows.execution.dask_worker",
    }
    return DaskTaskRunner(cluster_kwargs=options)


def _ray(cluster: str | None, workers: int) -> TaskRunner[Any]:
    try:
        import ray  # noqa: F401 - prefect-ray imports it late and would fail during a run
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
