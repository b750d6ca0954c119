"""Several processes quantize shares of one model: of this machine, or of others that see the same folder.

The process of the stage leads: it alone writes what lies outside the layers, and joins the parts. Whoever quantizes a
share holds a lock beside its file; the lock of a process that dies is free again.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEADS = "leads.lock"  # held while the other processes may help


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether the part `path` is this process's to write: it is not there, and nobody else is at it. Nothing is once
    the folder is gone, because the model is finished."""
    try:
        file = path.with_suffix(".lock").open("w")
    except FileNotFoundError:
        yield False
        return
    with file:
        if not _locked(file.fileno(), fcntl.LOCK_EX):
            yield False
            return
        yield not path.exists()


@contextmanager
def leading(folder: Path) -> Iterator[None]:
    """Let others help with the parts in `folder` for the duration of the body."""
    with (folder / LEADS).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_led(folder: Path) -> bool:
    """Whether a process leads in `folder`."""
    try:
        with (folder / LEADS).open("r+") as file:
            return not _locked(file.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _locked(file: int, kind: int) -> bool:
    """Lock the file, if that is possible now."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
