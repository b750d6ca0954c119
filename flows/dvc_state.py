"""Damage that DVC does not get over by itself, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from flows.errors import FlowError


def check_dvc(root: Path) -> None:
    """FlowError for the first thing in `root` that would make DVC fail or wait for ever."""
    for problem in damage(root):
        raise FlowError(problem)


def damage(root: Path) -> Iterator[str]:
    """What is damaged in `root`, each with its remedy."""
    if not (root / ".dvc").is_dir():
        yield f"{root} is no DVC project: .dvc is missing; use a clone of the repository, or run `dvc init`"
    lock = root / "dvc.lock"
    if lock.is_file() and not lock.read_bytes().strip():
        yield "dvc.lock is empty, as after a crash or a full disk; `git checkout dvc.lock`, or remove it"
    yield from _lock_damage(root / ".dvc/tmp/rwlock")


def _lock_damage(path: Path) -> Iterator[str]:
    name = Path(".dvc/tmp") / path.name
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        holders = [
            *held.get("write", {}).values(),
            *(one for some in held.get("read", {}).values() for one in some),
        ]
        processes = {int(holder["pid"]): str(holder["cmd"]) for holder in holders}
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError, AttributeError):
        yield f"{name} is damaged, as after a crash; remove it once no `dvc` is running"
        return
    for pid, command in processes.items():
        # DVC believes in a lock as long as any process has the number of the one that took it
        if psutil.pid_exists(pid) and not _is_dvc(pid):
            yield f"{name} is held by process {pid} ({command}), which is not DVC any more; remove {name}"


def _is_dvc(pid: int) -> bool:
    try:
        words: list[Any] = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return any("dvc" in Path(str(word)).name or str(word).startswith("dvc") for word in words)
