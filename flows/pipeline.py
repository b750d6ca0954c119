"""The pipeline of one checkout: read the plan from dvc.yaml, bring every stage up to date, record the results.

Prefect decides when and where a stage runs, DVC decides whether, MLflow records the results.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Crashed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.errors import FlowError
from flows.execution.assistants import Assistants
from flows.execution.heartbeat import beating
from flows.execution.output_backup import recover
from flows.execution.runner import Executor, task_runner
from flows.execution.single_flight import stage_key
from flows.execution.stage_task import stage_task
from flows.graph.dvc_state import check_dvc
from flows.graph.params_file import read_settings
from flows.graph.plan import Plan, read_plan, summary
from flows.graph.preflight import check_settings_work
from flows.graph.schedule import doomed, startable, threads_of
from flows.processes.forked import fork_server
from flows.processes.process import stopped_on_error
from flows.tracking.mlflow_run import recorded
from flows.tracking.prefect_artifacts import show_result
from flows.workspace.run_lock import exclusive
from tasks.hardware import cpu_cores
from tasks.settings import Settings

THREADS = Executor()
PATIENCE = 15.0  # seconds for stages on a cluster to end after an interrupt
DOWNLOAD = "download"  # after this stage, the variants can be checked against the model


class PipelineError(FlowError):
    """At least one stage failed; `results` has the outcomes of the others."""

    def __init__(self, message: str, results: dict[str, str]) -> None:
        super().__init__(message)
        self.results = results


def bring_up_to_date(
    root: Path, home: Path, jobs: int, timeout_minutes: float | None, executor: Executor = THREADS
) -> dict[str, str]:
    """Run the outdated stages of the checkout `root`, at most `jobs` at a time. Call it inside a flow run.

    home: the checkout with the records and locks; the same as `root`, unless `root` is a private workspace.
    executor: where the stages run; on a cluster, `root` and `home` must be the same paths on every worker.
    Returns the outcome of each stage: unchanged, restored or executed. FlowError names all failed stages.
    """
    log = get_run_logger()
    settings = read_settings(root / "params.yaml")
    with exclusive(root):
        check_dvc(root)
        for path in recover(root):
            log.info("%s restored: a killed run had moved it away", path)
        plan = read_plan(root)
        log.info("%s", summary(plan))
        if not executor.elsewhere and any(stage.state != "unchanged" for stage in plan.values()):
            fork_server()  # it imports the libraries while the settings are checked
        there = executor.cluster is not None
        check_settings_work(root, DOWNLOAD in plan and plan[DOWNLOAD].state == "unchanged", elsewhere=there)
        timeout = 60 * timeout_minutes if timeout_minutes else None
        with recorded(root, home, plan, log, _identity()) as record:
            results, failures = _run_stages(root, home, plan, jobs, timeout, executor, settings)
            if failures:
                if "report" in results:  # perhaps no variant passed, which is also a result
                    record.results(results)
                raise PipelineError(_failed(failures, results, plan), results)
            record.complete(results)
        show_result(root)
        log.info("%s", ", ".join(f"{n} {what}" for what, n in sorted(Counter(results.values()).items())))
    return results


def _run_stages(
    root: Path,
    home: Path,
    plan: Plan,
    jobs: int,
    timeout: float | None,
    executor: Executor,
    settings: Settings,
) -> tuple[dict[str, str], dict[str, BaseException]]:
    """Results and errors by stage. After a failure, the stages that depend on the failed one are skipped."""
    log = get_run_logger()
    cores = cpu_cores()
    running: dict[str, PrefectFuture[Any]] = {}
    began: dict[str, float] = {}
    # keep states of ended stages, not futures: a cluster recomputes the futures of a lost worker
    states: dict[str, State[Any]] = {}
    results: dict[str, str] = {}
    failures: dict[str, BaseException] = {}
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def submit(name: str, threads: int) -> None:
        stage = plan[name]
        unchanged = stage.state == "unchanged"
        needed: Any = [states[up] for up in stage.upstreams]  # Prefect accepts states as well as futures
        future = (here if unchanged else there).submit(
            stage_task,
            {
                "root": str(root),
                "home": str(home),
                "stage": name,
                "key": stage_key(root, stage),
                "outs": [out.path for out in stage.outs],
                "unchanged": unchanged,
                "timeout": timeout,
                # `threads` is based on the cores of this machine
                "threads": None if executor.cluster else threads,
                "pulse": str(pulse) if executor.elsewhere else None,
            },
            wait_for=needed,
        )
        running[name] = future
        began[name] = time.monotonic()
        future.add_done_callback(lambda _: ended.put(name))

    def upstreams() -> dict[str, tuple[str, ...]]:
        lost = {*failures, *doomed({s.name: s.upstreams for s in plan.values()}, failures)}
        return {s.name: s.upstreams for s in plan.values() if s.name not in lost}

    with (
        ThreadPoolTaskRunner[Any]() as here,
        task_runner(executor, jobs, root) as there,
        _finished(running),
        beating(root, str(flow_run.id)) as pulse,
        stopped_on_error(),
    ):
        each = None if executor.cluster else max(1, cores // jobs)  # threads of a helper
        helpers = Assistants(root, settings, there, ended.put, jobs, each, pulse) if executor.elsewhere else None
        while True:
            starting = startable(upstreams(), results, running, jobs)
            threads = [threads_of(name, starting, running, jobs, cores) for name in starting]
            for name, count in zip(starting, threads, strict=True):
                submit(name, count)
            if not running:
                return results, failures
            again = helpers.send({name: began[name] for name in running}) if helpers else None
            try:
                name = ended.get(timeout=again)
            except queue.Empty:  # a stage has run long enough to be helped
                continue
            if helpers and helpers.done(name):
                continue
            outcome, state = _outcome(name, running.pop(name))
            states[name] = state
            error = _refusal(root, name, outcome, executor) if state.is_completed() else _error(name, outcome, state)
            if error is None:
                results[name] = outcome
                if outcome != "unchanged":
                    log.info("%s: %s; %d of %d stages done", name, outcome, len(results), len(plan))
            else:
                failures[name] = error
                log.error("%s", error)


@contextmanager
def _finished(running: dict[str, PrefectFuture[Any]]) -> Iterator[None]:
    """After an error, wait for running stages to end cleanly before their workers are stopped."""
    try:
        yield
    except BaseException:
        end = time.monotonic() + PATIENCE
        for future in running.values():
            future.wait(timeout=max(end - time.monotonic(), 0))
        raise


def _outcome(stage: str, future: PrefectFuture[Any]) -> tuple[Any, State[Any]]:
    """A stage's result or exception, and its state. A repeatedly lost worker also counts as a failure."""
    future.wait()
    try:
        return future.result(raise_on_failure=False), future.state
    except Exception as error:
        lost = FlowError(f"{stage}: lost with its worker ({type(error).__name__}: {error}); see the cluster's logs")
        return lost, Crashed(message=str(lost))


def _refusal(root: Path, stage: str, outcome: str, executor: Executor) -> FlowError | None:
    """Check the settings against a newly downloaded model; return the error, if any."""
    if stage == DOWNLOAD and outcome != "unchanged":
        try:
            check_settings_work(root, downloaded=True, elsewhere=executor.cluster is not None)
        except FlowError as error:
            return error
    return None


def _error(stage: str, outcome: object, state: object) -> BaseException:
    return outcome if isinstance(outcome, BaseException) else FlowError(f"{stage}: {state}")


def _failed(failures: dict[str, BaseException], results: dict[str, str], plan: Plan) -> str:
    """One line with the errors, the skipped stages and the finished ones."""
    lost = doomed({s.name: s.upstreams for s in plan.values()}, failures)
    finished = [name for name, what in results.items() if what != "unchanged"]
    parts = [str(error) for error in failures.values()]
    parts += [f"skipped, because they depend on a failed stage: {', '.join(lost)}"] if lost else []
    parts += [f"finished and kept for the next run: {', '.join(finished)}"] if finished else []
    unchanged = len(results) - len(finished)
    parts += [f"unchanged: {unchanged} stage{'s' if unchanged > 1 else ''}"] if unchanged else []
    return "; ".join(parts)


def _identity() -> dict[str, str]:
    """The name of this run, and its id in Prefect."""
    return {"name": str(flow_run.name), "prefect.flow_run_id": str(flow_run.id)}
