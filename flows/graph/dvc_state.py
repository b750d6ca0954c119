"""Detect damage from which DVC does not recover, and name the remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from flows.errors import FlowError

LOCK_FILE = "dvc.lock"
RWLOCK = Path(".dvc/tmp/rwlock")
REMEDY = "`modelpress doctor --repair` fixes it"


def check_dvc(root: Path) -> None:
    """FlowError for the first problem in `root` that would make DVC fail or hang."""
    for problem in damage(root):
        raise FlowError(problem)


def damage(root: Path) -> Iterator[str]:
    """Yield each damage in `root` with its remedy."""
    if not (root / ".dvc").is_dir():
        yield f"{root} is not a DVC project: .dvc is missing; use a clone of the repository, or run `dvc init`"
    if problem := lock_file_problem(root):
        yield f"{LOCK_FILE} {problem}; {REMEDY}"
    if problem := locks_problem(root):
        yield f"{RWLOCK} {problem}; {REMEDY}"


def lock_file_problem(root: Path) -> str | None:
    """The problem of dvc.lock; None if it is sound or missing."""
    path = root / LOCK_FILE
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip("\0 \n"):
        return "is empty, as after a crash or a full disk"
    return None if sound_lock_file(text) else "is damaged, as after a crash or a merge"


def sound_lock_file(text: str) -> bool:
    """Whether the text is a valid dvc.lock: every stage has a command, every item a path."""
    try:
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe
        stages = content["stages"]
        return bool(content["schema"]) and all(_sound_stage(stage) for stage in stages.values())
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        return False


def _sound_stage(stage: Any) -> bool:
    items = [item for what in ("deps", "outs") if what in stage for item in stage[what]]
    return "cmd" in stage and all("path" in item for item in items)


def locks_problem(root: Path) -> str | None:
    """The problem of DVC's file locks; None if they are sound."""
    try:
        holders = _holders(root)
    except (ValueError, TypeError, KeyError, AttributeError):
        return "is damaged, as after a crash"
    for pid, command in holders.items():
        # DVC honours a lock as long as any process has the id of its holder
        if psutil.pid_exists(pid) and not _is_dvc(pid):
            return f"is held by process {pid} ({command}), which is no longer DVC"
    return None


def dvc_at_work(root: Path) -> Iterator[tuple[int, str]]:
    """Process id and command of every DVC process that locks files of `root`."""
    try:
        holders = _holders(root)
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    yield from ((pid, command) for pid, command in holders.items() if _is_dvc(pid))


def _holders(root: Path) -> dict[int, str]:
    """Process id -> command for all holders in DVC's lock file; ValueError or similar if it is damaged."""
    try:
        held = json.loads((root / RWLOCK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    holders = [*held.get("write", {}).values(), *(one for some in held.get("read", {}).values() for one in some)]
    return {int(holder["pid"]): str(holder["cmd"]) for holder in holders}


def _is_dvc(pid: int) -> bool:
    try:
        # a forked process shows its command line as one word
        words = [Path(word) for word in " ".join(psutil.Process(pid).cmdline()).split()]
    except psutil.Error:
        return False
    # dvc, `python -m dvc` or `python .../dvc/__main__.py`; not an editor of dvc.yaml
    return any(word.name in ("dvc", "dvc.exe") or word.parts[-2:] == ("dvc", "__main__.py") for word in words)
