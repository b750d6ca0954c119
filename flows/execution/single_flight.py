"""Single flight: when several runs need the same stage at once, one computes it and the others take its result.

Workspaces share DVC's cache, but DVC locks only the checkout. Without this lock, two runs that reach the same stage at
the same time would both compute it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.graph.dvc_lock import lock_stages
from flows.graph.plan import Stage, touches

LOCKS = Path(".modelpress/stages")


def stage_key(root: Path, stage: Stage) -> str:
    """sha256 of everything that determines the outputs of `stage`: command, parameters, code and input bytes.

    Call it after the upstream stages have ended, because it reads their outputs' checksums from dvc.lock.
    """
    made = {out["path"]: out.get("md5") for entry in lock_stages(root).values() for out in entry.get("outs", [])}
    reads: dict[str, object] = {}
    for dep in stage.deps:
        inside = {path: md5 for path, md5 in made.items() if touches(Path(path), [Path(dep)])}
        reads[dep] = inside or _digest(root / dep)
    content = json.dumps([stage.name, stage.command, stage.params, reads], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


@contextmanager
def computed_once(home: Path, key: str, waiting: Callable[[], None]) -> Iterator[int]:
    """Lock the stage `key` among all runs that share `home`; while another run holds it, call `waiting` repeatedly.

    Yields the lock's file descriptor. The lock is released when the last process with the file open ends. Pass it to
    the stage's guard, so that other runs wait until all processes of a killed worker's stage have ended.
    """
    folder = home / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / key).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
        yield file.fileno()


def _digest(path: Path) -> str | None:
    """sha256 of a file, or of a folder's files and their names; None if it does not exist."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    else:
        files = [path] if path.is_file() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else None
