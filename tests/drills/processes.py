"""Finding the processes of a run, striking them, and seeing that none is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from tests.waiting import soon

PATIENCE = 180.0  # seconds for anything that must come, on a busy machine
END = 15.0  # seconds in which a struck run's processes must be gone


def strike(processes: Iterable[psutil.Process]) -> int:
    """SIGKILL them; how many were there to be struck."""
    struck = 0
    for process in processes:
        try:
            os.kill(process.pid, signal.SIGKILL)
            struck += 1
        except ProcessLookupError:
            pass
    return struck


def family(pid: int, chosen: Callable[[list[str]], bool]) -> list[psutil.Process]:
    """The descendants of a process whose command line is chosen."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if chosen(words(child))]


def is_stage(words: list[str], stage: str) -> bool:
    """The stage's own program."""
    return words[1:3] == ["stage.py", stage]


def is_dvc(words: list[str], stage: str) -> bool:
    """DVC at a stage, not the guard in front of it."""
    return words[1:4] == ["-P", "-m", "dvc"] and words[-1] == stage


def is_server(words: list[str]) -> bool:
    """The Prefect server of a run."""
    return words[1:4] == ["-P", "-m", "uvicorn"]


def below(root: Path) -> list[psutil.Process]:
    """Every process that works in `root` or was started with a path in it, this one and its ancestors left out."""
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for process in psutil.process_iter() if process.pid not in mine and _works_in(process, root)]


def orphans(root: Path) -> list[str]:
    """The commands of what is still there after the time in which all must end; they are ended now."""
    if soon(lambda: not below(root), END):
        return []
    left = below(root)
    found = [" ".join(words(process))[:120] for process in left]
    strike(left)
    return found


def words(process: psutil.Process) -> list[str]:
    """Its command line; empty where it is gone."""
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
