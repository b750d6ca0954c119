"""Back up a stage's outputs, because DVC deletes them before it runs a stage.

The backup consists of hard links, so it takes no time or space. If a run is killed, the next run restores its backup.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

KEPT = Path(".modelpress/kept")
PART = ".part"


@contextmanager
def kept(root: Path, stage: str, outs: Iterable[str]) -> Iterator[None]:
    """Back up the outputs `outs` (paths in `root`), and restore them if the body fails."""
    folder = root / KEPT / stage
    # if a worker was killed in this stage, restore its backup first
    _restore(root, folder, replace=True)
    part = folder.with_name(f"{stage}{PART}")
    shutil.rmtree(part, ignore_errors=True)
    for out in outs:
        if os.path.lexists(root / out):
            _link(root / out, part / quote(out, safe=""))
    if part.exists():
        os.replace(part, folder)  # atomic, so that no partial backup is ever restored
    try:
        yield
    except BaseException:
        _restore(root, folder, replace=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def recover(root: Path) -> list[str]:
    """Restore the backups of a killed run; return the restored paths."""
    folders = sorted((root / KEPT).iterdir()) if (root / KEPT).is_dir() else []
    return [path for folder in folders if folder.suffix != PART for path in _restore(root, folder, replace=False)]


def _restore(root: Path, folder: Path, *, replace: bool) -> list[str]:
    """Move the backup in `folder` to its place: only missing outputs, or all with `replace`."""
    restored = []
    for source in sorted(folder.iterdir()) if folder.is_dir() else []:
        path = unquote(source.name)
        destination = root / path
        if os.path.lexists(destination):
            if not replace:
                continue
            _remove(destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, destination)
        restored.append(path)
    shutil.rmtree(folder, ignore_errors=True)
    return restored


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _link(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, destination, symlinks=True, copy_function=_link_file)
    else:
        _link_file(source, destination)


def _link_file(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, destination, follow_symlinks=False)
