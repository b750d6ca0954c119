"""The flow of a run in place: the checkout that one stands in is brought up to date.

modelpress run
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.execution.runner import Executor, RunnerName
from flows.pipeline import PipelineError, bring_up_to_date

__all__ = ["PipelineError", "optimize"]


# on one machine threads are right: stages are subprocesses; `jobs`, not the pool, limits them
@flow(name="optimize", persist_result=False)
def optimize(
    root: str | None = None,
    jobs: Annotated[int, Field(ge=1, le=64)] = 2,
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None,
    runner: RunnerName = RunnerName.threads,
    cluster: str | None = None,
) -> dict[str, str]:
    """Bring the pipeline in `root` (this folder) up to date, at most `jobs` stages at a time.

    runner: what runs the stages; cluster: the address of a Dask or Ray cluster, without which one is started here.
    Returns what became of each stage: unchanged, restored or executed. FlowError names all that failed.
    """
    folder = Path(root or ".").resolve()
    return bring_up_to_date(folder, folder, jobs, timeout_minutes, Executor(runner, cluster))
