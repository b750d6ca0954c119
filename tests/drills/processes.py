"""Find the processes of a run, kill them, and check that none is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from tests.waiting import soon

PATIENCE = 180.0  # timeout in seconds for any event, on a busy machine
END = 15.0  # seconds within which the processes of a killed run must end


def strike(processes: Iterable[psutil.Process]) -> int:
    """SIGKILL the processes; return how many still existed."""
    struck = 0
    for process in processes:
        try:
            os.kill(process.pid, signal.SIGKILL)
            struck += 1
        except ProcessLookupError:
            pass
    return struck


def family(pid: int, chosen: Callable[[list[str]], bool]) -> list[psutil.Process]:
    """The descendants of a process with a matching command line."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if chosen(words(child))]


def is_stage(words: list[str], stage: str) -> bool:
    """Whether it is the stage's program."""
    return words[1:3] == ["stage.py", stage]


def is_dvc(words: list[str], stage: str) -> bool:
    """Whether it is DVC running the stage, not its guard."""
    return words[1:4] == ["-P", "-m", "dvc"] and words[-1] == stage


def is_server(words: list[str]) -> bool:
    """Whether it is the Prefect server of a run."""
    return words[1:4] == ["-P", "-m", "uvicorn"]


def below(root: Path) -> list[psutil.Process]:
    """Every process with its working directory or an argument in `root`, except this one and its ancestors."""
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for process in psutil.process_iter() if process.pid not in mine and _works_in(process, root)]


def orphans(root: Path) -> list[str]:
    """The commands of processes that have not ended in time; kills them."""
    if soon(lambda: not below(root), END):
        return []
    left = below(root)
    found = [" ".join(words(process))[:120] for process in left]
    strike(left)
    return found


def words(process: psutil.Process) -> list[str]:
    """The command line of a process; empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _works_in(process: psutil.Process, root: Path) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return Path(process.cwd()).is_relative_to(root) or any(str(root) in word for word in process.cmdline())
    except (psutil.Error, OSError):
        return False
