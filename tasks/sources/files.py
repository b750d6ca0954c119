"""Common parts of all sources: the result of a fetch, checksums, disk space, download locks."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tasks.errors import TaskError
from tasks.output import sha256

DOWNLOADS = Path(".modelpress/downloads")  # kept across interruptions and DVC's deletion of outputs


@dataclass(frozen=True)
class Fetched:
    """The result of a fetch.

    `file`: the requested file, None for a whole model. `files`: the model's files by name, or the licence texts beside
    a single file. `revision`: the hub's commit or the wheel's version. `pin`: the value for `sha256` in params.yaml,
    None for a folder. `own`: whether these are the user's files, which may be copied but not linked to.
    """

    kind: Literal["hf", "path", "wheel"]
    revision: str | None
    pin: str | None
    file: Path | None
    files: dict[str, Path] = field(default_factory=dict)
    licence: str | None = None
    own: bool = False


def check_pin(path: Path, expected: str | None, source: str) -> str:
    """Return the sha256 of the file at `path`; TaskError if it differs from `expected`."""
    found = sha256(path)
    if expected not in (None, found):
        raise TaskError(
            f"{source} has the sha256 {found}, but params.yaml expects {expected}; if you trust the new "
            "bytes, write that checksum into params.yaml, otherwise find out what changed them"
        )
    return found


def require_space(folder: Path, needed: int, what: str) -> None:
    """TaskError if fewer than `needed` bytes are free on the disk of `folder`, which need not exist."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TaskError(
            f"{what} needs {size(needed)}, but {folder.resolve()} has only {size(free)} free; "
            "free some space there, then run again"
        )


def size(number: float) -> str:
    """Format bytes: `size(98362432)` is `98.4 MB`."""
    if number < 1000:
        return f"{number:.0f} bytes"
    steps = min(int(math.log10(number) // 3), 4)
    return f"{number / 1000**steps:.1f} {('', 'kB', 'MB', 'GB', 'TB')[steps]}"


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the lock of a download that several stages may request at once; released when the process ends."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        yield
