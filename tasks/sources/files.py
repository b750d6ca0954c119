"""What every kind of source shares: what a fetch returns, checksums, disk space, one download at a time."""

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

DOWNLOADS = Path(".modelpress/downloads")  # survives an interruption, and DVC's deletion of a stage's outputs


@dataclass(frozen=True)
class Fetched:
    """What a source gave.

    `file` is the one file asked for, None if it was a whole model; `files` are the model's files by name, or
    the licence texts that came along with the one file. `revision` is the hub's commit or the wheel's
    version. `pin` is the value for `sha256` in params.yaml, None for a folder. `own` is true for a person's
    own files, which may be read and copied but not linked to.
    """

    kind: Literal["hf", "path", "wheel"]
    revision: str | None
    pin: str | None
    file: Path | None
    files: dict[str, Path] = field(default_factory=dict)
    licence: str | None = None
    own: bool = False


def check_pin(path: Path, expected: str | None, source: str) -> str:
    """The sha256 of the file at `path`; TaskError if `expected` is another one."""
    found = sha256(path)
    if expected not in (None, found):
        raise TaskError(
            f"{source} has the sha256 {found}, but params.yaml expects {expected}; if you trust the new "
            "bytes, write that checksum into params.yaml, else find out what changed them"
        )
    return found


def require_space(folder: Path, needed: int, what: str) -> None:
    """TaskError if fewer than `needed` bytes are free where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TaskError(
            f"{what} needs {size(needed)}, but {folder.resolve()} has only {size(free)} free; "
            "free some space there, then run again"
        )


def size(number: float) -> str:
    """Bytes in a person's unit: `size(98362432)` is `98.4 MB`."""
    if number < 1000:
        return f"{number:.0f} bytes"
    steps = min(int(math.log10(number) // 3), 4)
    return f"{number / 1000**steps:.1f} {('', 'kB', 'MB', 'GB', 'TB')[steps]}"


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the lock of a download that several stages may want at once; it ends with the process."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        yield
