"""The flow: read the plan from dvc.yaml, bring every stage up to date, record what came out.

    modelpress run

Prefect decides when and where a stage runs, DVC decides whether, MLflow remembers.
"""

from __future__ import annotations

import os
import queue
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from pydantic import Field

from flows.check import check_settings_work
from flows.checkout import exclusive
from flows.dvc_state import check_dvc
from flows.errors import FlowError
from flows.kept import recover
from flows.overrides import read_settings
from flows.plan import Plan, read_plan, summary
from flows.process import stopped_on_error
from flows.record import recorded
from flows.schedule import doomed, startable, threads_of
from flows.stage import stage_task

DOWNLOAD = "download"  # the stage after which the variants can be held against the model


class PipelineError(FlowError):
    """At least one stage failed; `results` says what became of the others."""

    def __init__(self, message: str, results: dict[str, str]) -> None:
        super().__init__(message)
        self.results = results


# Prefect's default runner is right: stages are subprocesses, so threads do; `jobs`, not the pool, limits them
@flow(name="optimize", persist_result=False)
def optimize(
    root: str | None = None,
    jobs: Annotated[int, Field(ge=1, le=64)] = 2,
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None,
) -> dict[str, str]:
    """Bring the pipeline in `root` (this folder) up to date, at most `jobs` stages at a time.

    Returns what became of each stage: unchanged, restored or executed. FlowError names all that failed.
    """
    log = get_run_logger()
    folder = Path(root or ".").resolve()
    read_settings(folder / "params.yaml")
    with exclusive(folder):
        check_dvc(folder)
        for path in recover(folder):
            log.info("%s is back: a run that was killed had taken it away", path)
        plan = read_plan(folder)
        log.info("%s", summary(plan))
        check_settings_work(folder, downloaded=DOWNLOAD in plan and plan[DOWNLOAD].state == "unchanged")
        timeout = 60 * timeout_minutes if timeout_minutes else None
        with recorded(folder, plan, log, flow_run_identity()) as record:
            results, failures = _run_stages(folder, plan, jobs, timeout)
            if failures:
                if "report" in results:  # no variant passed, perhaps: a result all the same
                    record.results(results)
                raise PipelineError(_failed(failures, plan), results)
            record.complete(results)
        _show(folder)
        log.info("%s", ", ".join(f"{n} {what}" for what, n in sorted(Counter(results.values()).items())))
    return results


def _run_stages(
    root: Path, plan: Plan, jobs: int, timeout: float | None
) -> tuple[dict[str, str], dict[str, BaseException]]:
    """Results and errors by stage. A failed stage takes along what needs it; the others go on."""
    log = get_run_logger()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    futures: dict[str, PrefectFuture[Any]] = {}
    results: dict[str, str] = {}
    failures: dict[str, BaseException] = {}
    running: set[str] = set()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def submit(name: str) -> None:
        stage = plan[name]
        futures[name] = stage_task.submit(
            root=str(root),
            stage=name,
            outs=[out.path for out in stage.outs],
            unchanged=stage.state == "unchanged",
            timeout=timeout,
            threads=threads_of(name, jobs, cores),
            wait_for=[futures[up] for up in stage.upstreams],
            return_state=False,
        )
        running.add(name)
        futures[name].add_done_callback(lambda _: ended.put(name))

    def upstreams() -> dict[str, tuple[str, ...]]:
        lost = {*failures, *doomed({s.name: s.upstreams for s in plan.values()}, failures)}
        return {s.name: s.upstreams for s in plan.values() if s.name not in lost}

    with stopped_on_error():
        while True:
            for name in startable(upstreams(), results, running, jobs):
                submit(name)
            if not running:
                return results, failures
            name = ended.get()
            running.remove(name)
            futures[name].wait()
            outcome, state = futures[name].result(raise_on_failure=False), futures[name].state
            error = _refusal(root, name, outcome) if state.is_completed() else _error(name, outcome, state)
            if error is None:
                results[name] = outcome
                if outcome != "unchanged":
                    log.info("%s: %s; %d of %d stages done", name, outcome, len(results), len(plan))
            else:
                failures[name] = error
                log.error("%s", error)


def _refusal(root: Path, stage: str, outcome: str) -> FlowError | None:
    """What is wrong with the settings, once there is a new model to hold them against."""
    if stage == DOWNLOAD and outcome != "unchanged":
        try:
            check_settings_work(root, downloaded=True)
        except FlowError as error:
            return error
    return None


def _error(stage: str, outcome: object, state: object) -> BaseException:
    return outcome if isinstance(outcome, BaseException) else FlowError(f"{stage}: {state}")


def _show(root: Path) -> None:
    """The result table as an artifact of the flow run."""
    table = root / "report/table.txt"
    if table.is_file():
        text = table.read_text(encoding="utf-8")
        create_markdown_artifact(key="result", markdown=f"```\n{text}\n```", description="the result table")


def _failed(failures: dict[str, BaseException], plan: Plan) -> str:
    lost = doomed({s.name: s.upstreams for s in plan.values()}, failures)
    text = "; ".join(str(error) for error in failures.values())
    return text + (f"; not run because of that: {', '.join(lost)}" if lost else "")


def flow_run_identity() -> dict[str, str]:
    """The name of this run and the id by which Prefect finds it again."""
    return {"name": str(flow_run.name), "prefect.flow_run_id": str(flow_run.id)}
