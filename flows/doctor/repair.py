"""`modelpress doctor --repair`: repair damage from which DVC and the next run cannot recover.

It removes only damaged files that a run can recreate or restore. It changes nothing while a run is active.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from flows.doctor.cache_check import Progress, damaged_objects, links_to
from flows.doctor.git_locks import AGE, git_at_work, locks, stale_locks
from flows.errors import FlowError
from flows.execution.output_backup import recover
from flows.graph.dvc_state import LOCK_FILE, RWLOCK, dvc_at_work, lock_file_problem, locks_problem, sound_lock_file
from flows.graph.plan import cache_folder
from flows.workspace.git import git
from flows.workspace.run_lock import exclusive, is_held
from flows.workspace.worktree import ABOUT, RUNS, workspaces

ASIDE = "dvc.lock.damaged"
OPENING = 60.0  # seconds until a workspace without a description counts as abandoned


def repair(root: Path, progress: Progress) -> Iterator[str]:
    """Repair the checkout `root`, the workspaces of its runs and their shared cache; yield a line for each repair.

    FlowError if a run or DVC is active in one of them, or if a running git may hold a lock.
    """
    with ExitStack() as stack:
        spaces = [space.root for space in workspaces(root)]
        for checkout in [root, *spaces]:
            stack.enter_context(exclusive(checkout))
            _require_no_dvc(checkout)
        _require_no_git(root)
        yield from _git_locks(root)
        yield from _worktrees(root)
        for checkout in [root, *spaces]:
            where = "" if checkout == root else f" in {checkout.relative_to(root)}"
            for line in (*_locks(checkout), *_lock_file(checkout), *_backups(checkout)):
                yield line + where
        yield from _cache(root, progress)


def _require_no_dvc(root: Path) -> None:
    for pid, command in dvc_at_work(root):
        raise FlowError(f"`{command}` (process {pid}) is running in {root}; wait until it ends")


def _require_no_git(root: Path) -> None:
    if locks(root):
        for pid, command in git_at_work(root):
            raise FlowError(f"`{command}` (process {pid}) is running in {root}; wait until it ends")


def _git_locks(root: Path) -> Iterator[str]:
    """Remove stale locks, after waiting for young ones."""
    time.sleep(max(0.0, AGE - min(locks(root).values(), default=AGE)))
    for lock in stale_locks(root):
        lock.unlink(missing_ok=True)
        yield f"removed {lock}: no running git holds it"


def _worktrees(root: Path) -> Iterator[str]:
    """Clean up worktrees that a killed run left half created or half removed."""
    for folder in sorted((root / RUNS).iterdir()) if (root / RUNS).is_dir() else ():
        old = time.time() - folder.lstat().st_mtime > OPENING
        if folder.is_dir() and not (folder / ABOUT).exists() and old and not is_held(folder):
            shutil.rmtree(folder)
            yield f"deleted {folder.relative_to(root)}, the workspace of a run that had not started"
    gone = re.findall(r"^worktree (.+)\n(?:.+\n)*prunable", git(root, "worktree", "list", "--porcelain"), re.MULTILINE)
    if gone:
        git(root, "worktree", "prune")
        yield f"removed missing worktrees from git: {', '.join(gone)}"


def _locks(root: Path) -> Iterator[str]:
    if problem := locks_problem(root):
        (root / RWLOCK).unlink(missing_ok=True)
        yield f"removed {RWLOCK}: {problem}"


def _lock_file(root: Path) -> Iterator[str]:
    """Restore dvc.lock from git, or remove it; DVC's run cache has the same information."""
    problem = lock_file_problem(root)
    if problem is None:
        return
    path, aside = root / LOCK_FILE, ""
    if path.read_bytes().strip():
        path.replace(root / ASIDE)
        aside = f", the damaged file is in {ASIDE}"
    committed = _committed(root)
    if committed is not None:
        part = path.with_suffix(".lock.part")
        part.write_text(committed, encoding="utf-8")
        part.replace(path)
        yield f"{LOCK_FILE} {problem}: restored from git{aside}"
    else:
        path.unlink(missing_ok=True)
        yield f"{LOCK_FILE} {problem}: removed, the next run restores it from DVC's run cache{aside}"


def _committed(root: Path) -> str | None:
    try:
        text = git(root, "show", f"HEAD:./{LOCK_FILE}")
    except FlowError:
        return None
    return text + "\n" if sound_lock_file(text) else None


def _backups(root: Path) -> Iterator[str]:
    for path in recover(root):
        yield f"{path} restored: a killed run had moved it away"


def _cache(root: Path, progress: Progress) -> Iterator[str]:
    """Remove damaged objects and all links to them; links first, so that an interrupted repair can resume."""
    cache = cache_folder(root)
    objects = damaged_objects(cache, progress)
    for link in links_to(root, objects, cache):
        link.unlink()
        yield f"deleted {link.relative_to(root)}: its bytes were damaged in DVC's cache; the next run recreates it"
    for path in objects:
        path.unlink()
        yield f"deleted {path.relative_to(cache)} from DVC's cache: its bytes did not match its name"
