"""Run one stage of dvc.yaml as a Prefect task: a subprocess with live log, timeout and cleanup."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from prefect.states import Completed

from flows.errors import FlowError
from flows.execution.heartbeat import gone
from flows.execution.log_lines import Lines
from flows.execution.out_of_memory import out_of_memory
from flows.execution.output_backup import kept
from flows.execution.single_flight import computed_once
from flows.processes.process import Process, Stopped, TimedOut, pause
from flows.processes.run_module import error_line, stage_environment
from flows.tracking.prefect_artifacts import ProgressArtifact
from tasks.errors import MEMORY_STATUS, TRANSIENT_STATUS

Result = Literal["unchanged", "restored", "executed"]
LOGS = Path(".modelpress/logs")
WAITS = (5.0, 20.0, 60.0)  # seconds before each retry

# lines that DVC prints for a user at a terminal
_CHATTER = re.compile(
    r"^(To track the changes|\tgit add|To enable auto staging|\tdvc config|Use `dvc push`"
    r"|Data and pipelines are up to date|> )"
)
# DVC's line with a stage's exit status; after a signal, the negative signal number, or 128 plus it from a shell
_STATUS = re.compile(r"failed to run: .*, exited with (-?\d+)$")
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
_BUSY = re.compile(r"is busy, it is being blocked|[Uu]nable to acquire lock")


class StageError(FlowError):
    """A stage ended with an error."""


class TransientStageError(StageError):
    """The network failed, or another process held a lock; a retry may help."""


class OutOfMemoryError(StageError):
    """The stage was killed, probably for lack of memory, or reported that it ran out of memory."""


def _may_work_next_time(_task: Any, _run: Any, state: Any) -> bool:
    """Retry only transient errors; others would repeat."""
    return isinstance(state.result(raise_on_failure=False), TransientStageError)


@task(
    name="stage",
    task_run_name="{stage}",
    retries=len(WAITS),
    retry_condition_fn=_may_work_next_time,
    persist_result=False,
    cache_policy=NO_CACHE,
)
def stage_task(
    root: str,
    home: str,
    stage: str,
    key: str,
    outs: list[str],
    unchanged: bool,
    timeout: float | None,
    threads: int | None,
    pulse: str | None,
) -> Any:
    """Bring one stage up to date. unchanged: the plan found nothing to do.

    key: the same for all runs of `home` that would compute the same result. One computes it, the others wait.
    pulse: on a cluster, the flow's heartbeat file; the stage stops when it goes stale.
    """
    if unchanged:
        return Completed(name="Cached", message="unchanged", data="unchanged")
    log = get_run_logger()
    stopped = _never
    if pulse is not None:
        here = f"{socket.gethostname()}, worker process {os.getpid()}"
        if not Path(root, "dvc.yaml").is_file():
            raise StageError(
                f"{stage}: {root} does not exist on {here}; the workspace must be on a disk that all workers share, at "
                "the same path"
            )
        log.info("on %s", here)
        stopped = gone(Path(pulse))
    show = ProgressArtifact(stage)
    try:
        with computed_once(Path(home), key, _waiting(log.info, stage, stopped)) as lock:
            return run_stage(
                Path(root),
                stage,
                outs,
                log=log.info,
                show=show,
                timeout=timeout,
                threads=threads,
                stopped=stopped,
                lock=lock,
            )
    except TransientStageError as error:
        _back_off(error, task_run.run_count, log.warning)
        raise


def _back_off(error: TransientStageError, attempt: int, log: Callable[[str], None]) -> None:
    """Announce the retry and wait. Prefect's own retry delay would ignore an interrupt."""
    if attempt <= len(WAITS):
        wait = WAITS[attempt - 1]
        log(f"{error}; retrying in {wait:g} s ({attempt} of {len(WAITS)})")
        with suppress(Stopped):
            pause(wait)


def _never() -> bool:
    return False


def _waiting(log: Callable[[str], None], stage: str, stopped: Callable[[], bool]) -> Callable[[], None]:
    """Return a function that waits for another run and logs this once; StageError if this run is stopped."""
    said: list[str] = []

    def wait() -> None:
        if not said:
            said.append("waiting for another run that computes the same result")
            log(said[0])
        try:
            pause(0.5)
            if stopped():
                raise Stopped
        except Stopped:
            raise StageError(f"{stage}: stopped, the run was interrupted") from None

    return wait


def run_stage(
    root: Path,
    stage: str,
    outs: list[str],
    *,
    log: Callable[[str], None],
    show: Callable[[float, str], None] = lambda share, line: None,
    timeout: float | None = None,
    threads: int | None = None,
    stopped: Callable[[], bool] = _never,
    lock: int | None = None,
) -> Result:
    """Bring `stage` of the pipeline in `root` up to date and write its log to a file. timeout: in seconds.

    show: called with the finished share of the work (0 to 1) and the corresponding log line.
    stopped: polled to learn whether the run was interrupted elsewhere.
    lock: an open file that stays open until all processes of the stage have ended.
    StageError contains the stage's error message. On any error, the outputs `outs` are restored.
    """
    record = root / LOGS / f"{stage}.log"
    record.parent.mkdir(parents=True, exist_ok=True)
    # a global option, so before `repro`. Without it, a finished stage fails while another one is hashing.
    command = [sys.executable, "-P", "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    lines = Lines()
    result: Result = "unchanged"
    tail: list[str] = []
    with kept(root, stage, outs), record.open("w", encoding="utf-8") as file:

        def take(line: str) -> None:
            nonlocal result
            if _CHATTER.match(line):
                return
            file.write(line + "\n")
            file.flush()
            tail.append(line)
            del tail[:-50]
            if line.startswith("Running stage "):
                result = "executed"
            elif "is cached - skipping run" in line:
                result = "restored"
            elif not line.startswith(("Stage '", "Updating lock file", "Generating lock file", "ERROR: ")):
                log(line)
                if lines.share is not None:
                    show(lines.share, line)

        try:
            keep = () if lock is None else (lock,)
            with Process(command, root, stage_environment(os.environ, threads), keep=keep, forked=True) as process:
                for chunk in process.chunks(timeout):
                    if stopped():
                        raise Stopped
                    for line in lines.feed(chunk):
                        take(line)
                for line in lines.close():
                    take(line)
                status = process.wait()
        except TimedOut:
            given = f"{(timeout or 0) / 60:g} minutes"
            raise StageError(f"{stage}: stopped after {given}; allow more with --timeout (log: {record})") from None
        except Stopped:
            raise StageError(f"{stage}: stopped, the run was interrupted") from None
        if status:
            raise _failure(stage, tail, status, process.peak_memory, record)
    return result


def _failure(stage: str, tail: list[str], status: int, peak: int, record: Path) -> StageError:
    """The error for a failed stage. tail: its last lines; status: DVC's exit status; peak: its memory in bytes."""
    said = [int(match[1]) for line in tail if (match := _STATUS.search(line))]
    stages = said[-1] if said else status
    word = error_line(tail, status)
    # stages that were stopped by the flow do not get here
    if stages in _KILLED:
        word = out_of_memory(stage, "killed, most likely by the system because memory ran out", peak)
    elif stages == MEMORY_STATUS:
        word = out_of_memory(stage, word.partition(";")[0], peak)
    else:
        again = stages == TRANSIENT_STATUS or _BUSY.search("\n".join(tail))
        return (TransientStageError if again else StageError)(f"{stage}: {word} (log: {record})")
    return OutOfMemoryError(f"{word} (log: {record})")
