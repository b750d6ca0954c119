"""The flow for a run in the current checkout.

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


# threads suffice on one machine: stages are subprocesses, limited by `jobs`, not by the pool
@flow(name="optimize", persist_result=False)
def optimize(
    root: str | None = None,
    jobs: Annotated[int, Field(ge=1, le=64)] = 2,
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None,
    runner: RunnerName = RunnerName.threads,
    cluster: str | None = None,
) -> dict[str, str]:
    """Bring the pipeline in `root` (default: this folder) up to date, at most `jobs` stages at a time.

    runner: the task runner for stages; cluster: the address of a Dask or Ray cluster; None: start a local one.
    Returns the outcome of each stage: unchanged, restored or executed. FlowError names all failed stages.
    """
    folder = Path(root or ".").resolve()
    return bring_up_to_date(folder, folder, jobs, timeout_minutes, Executor(runner, cluster))
