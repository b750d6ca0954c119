"""One stage of dvc.yaml as one Prefect task: a subprocess, its log as it happens, a timeout, a clean end."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from flows.errors import FlowError
from flows.kept import kept
from flows.once import computed_once
from flows.process import Process, Stopped, TimedOut, pause
from flows.progress import Lines
from flows.pulse import gone
from flows.words import last_word, stage_environment

Result = Literal["unchanged", "restored", "executed"]
LOGS = Path(".modelpress/logs")

# what DVC says to a person at a terminal, who is not reading here
_CHATTER = re.compile(
    r"^(To track the changes|\tgit add|To enable auto staging|\tdvc config|Use `dvc push`"
    r"|Data and pipelines are up to date|> )"
)
_BUSY = re.compile(r"is busy, it is being blocked|[Uu]nable to acquire lock")


class StageError(FlowError):
    """A stage ended with an error."""


class LockBusyError(StageError):
    """Another process held DVC's lock; trying again helps."""


def _lock_was_busy(_task: Any, _run: Any, state: Any) -> bool:
    """A failing stage fails again, a busy lock does not."""
    return isinstance(state.result(raise_on_failure=False), LockBusyError)


@task(
    name="stage",
    task_run_name="{stage}",
    retries=3,
    retry_delay_seconds=5,
    retry_condition_fn=_lock_was_busy,
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
    with computed_once(Path(home), key, _waiting(log.info, stage, stopped)) as lock:
        return run_stage(
            Path(root), stage, outs, log=log.info, timeout=timeout, threads=threads, stopped=stopped, lock=lock
        )


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
    timeout: float | None = None,
    threads: int | None = None,
    stopped: Callable[[], bool] = _by_nobody,
    lock: int | None = None,
) -> Result:
    """Bring `stage` of the pipeline in `root` up to date, `timeout` in seconds; its log is also in a file.

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

        try:
            keep = () if lock is None else (lock,)
            with Process(command, root, stage_environment(os.environ, threads), keep=keep) as process:
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
            busy = _BUSY.search("\n".join(tail))
            raise (LockBusyError if busy else StageError)(f"{stage}: {last_word(tail, status)} (log: {record})")
    return result
