"""Find stale index locks of a killed git, which prevent commits and checkouts."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from flows.workspace.git import git

AGE = 10.0  # seconds after which a lock without a git process is stale


def locks(root: Path) -> dict[Path, float]:
    """The locks of the repository of `root` and of its worktrees, held or stale, and their age in seconds."""
    folder = root / git(root, "rev-parse", "--git-common-dir")
    found = {}
    for lock in (folder / "index.lock", *folder.glob("worktrees/*/index.lock")):
        with suppress(FileNotFoundError):
            found[lock] = time.time() - lock.stat().st_mtime
    return found


def stale_locks(root: Path) -> list[Path]:
    """The stale locks: old enough, and no git is running in the repository."""
    old = [lock for lock, age in locks(root).items() if age >= AGE]
    return old if old and not list(git_at_work(root)) else []


def git_at_work(root: Path) -> Iterator[tuple[int, str]]:
    """Process id and command of every git that runs in the repository of `root` or one of its worktrees."""
    places = [Path(line) for line in re.findall(r"^worktree (.+)$", git(root, "worktree", "list", "--porcelain"), re.M)]
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # ended, or another user's
            if process.name() == "git" and any(Path(process.cwd()).is_relative_to(place) for place in places):
                yield process.pid, " ".join(process.cmdline()[:2])
