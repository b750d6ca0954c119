"""One stage of dvc.yaml as one Prefect task: a subprocess, its log as it happens, a timeout, a clean end."""

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
WAITS = (5.0, 20.0, 60.0)  # seconds before each new attempt

# what DVC says to a person at a terminal, who is not reading here
_CHATTER = re.compile(
    r"^(To track the changes|\tgit add|To enable auto staging|\tdvc config|Use `dvc push`"
    r"|Data and pipelines are up to date|> )"
)
# how DVC says which status a stage ended with; one that a signal ended has its number, by a shell with 128 added
_STATUS = re.compile(r"failed to run: .*, exited with (-?\d+)$")
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
_BUSY = re.compile(r"is busy, it is being blocked|[Uu]nable to acquire lock")


class StageError(FlowError):
    """A stage ended with an error."""


class TransientStageError(StageError):
    """The network, or a lock that another process held, is to blame; trying again may help."""


class OutOfMemoryError(StageError):
    """The stage was killed for want of memory, or said itself that it had too little."""


def _may_work_next_time(_task: Any, _run: Any, state: Any) -> bool:
    """A stage that failed for a reason of its own fails again."""
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
    """Bring one stage up to date; `unchanged` is the plan's word that nothing is to be done.

    `key` is what two runs of `home` have in common when they would compute the same: one does, the other waits.
    `pulse` is given on a cluster: the file by which the stage knows that its flow is still there.
    """
    if unchanged:
        return Completed(name="Cached", message="unchanged", data="unchanged")
    log = get_run_logger()
    stopped = _by_nobody
    if pulse is not None:
        here = f"{socket.gethostname()}, worker process {os.getpid()}"
        if not Path(root, "dvc.yaml").is_file():
            raise StageError(
                f"{stage}: {root} is not on {here}; the workspace must be on a disk that all workers share, in the "
                "same place"
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
    """Say that the stage is tried again, and wait: Prefect's own wait would not heed an interrupt."""
    if attempt <= len(WAITS):
        wait = WAITS[attempt - 1]
        log(f"{error}; trying again in {wait:g} s ({attempt} of {len(WAITS)})")
        with suppress(Stopped):
            pause(wait)


def _by_nobody() -> bool:
    return False


def _waiting(log: Callable[[str], None], stage: str, stopped: Callable[[], bool]) -> Callable[[], None]:
    """Say once that another run is at it; StageError when this run is stopped meanwhile."""
    said: list[str] = []

    def wait() -> None:
        if not said:
            said.append("waiting: another run is computing the same")
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
    stopped: Callable[[], bool] = _by_nobody,
    lock: int | None = None,
) -> Result:
    """Bring `stage` of the pipeline in `root` up to date, `timeout` in seconds; its log is also in a file.

    show: called with the share of the work that is done (0 to 1) and the line that says so.
    stopped: asked again and again whether the run that wants the stage was interrupted elsewhere; lock: an open file
    that stays open until nothing of the stage is left.
    StageError carries the stage's own last word; its outputs `outs` are then what they were before.
    """
    record = root / LOGS / f"{stage}.log"
    record.parent.mkdir(parents=True, exist_ok=True)
    # a global option, before `repro`: without it a stage fails, its work done, where a sibling is hashing
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
    """Why a stage failed, from the end of its output, DVC's exit status and the stage's peak of memory in bytes."""
    said = [int(match[1]) for line in tail if (match := _STATUS.search(line))]
    stages = said[-1] if said else status
    word = error_line(tail, status)
    # nobody here kills a stage that has not been stopped before
    if stages in _KILLED:
        word = out_of_memory(stage, "killed, most likely by the system for want of memory", peak)
    elif stages == MEMORY_STATUS:
        word = out_of_memory(stage, word.partition(";")[0], peak)
    else:
        again = stages == TRANSIENT_STATUS or _BUSY.search("\n".join(tail))
        return (TransientStageError if again else StageError)(f"{stage}: {word} (log: {record})")
    return OutOfMemoryError(f"{word} (log: {record})")
