"""A private checkout for each deployed run: a git worktree that shares DVC's cache.

The user's checkout is never changed. A run ends as a commit with its parameters, dvc.lock and metrics, and the tag
`run/NAME`, so `git checkout run/NAME && dvc repro` has nothing to do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from flows.errors import FlowError
from flows.graph.params_file import override
from flows.graph.plan import cache_folder, forget_others, read_plan
from flows.workspace.dvc_remote import share_dvc
from flows.workspace.git import git, git_says
from flows.workspace.run_lock import LOCK, is_held
from tasks.errors import TaskError
from tasks.settings import Settings, check_settings

RUNS = Path(".modelpress/runs")
ABOUT = Path(".modelpress/run.json")
TAG = "run/"
KEPT = ("params.yaml", "dvc.lock", "metrics")  # committed by a run
# shared with the user's checkout: downloads and item scores
SHARED = (".modelpress/downloads", ".modelpress/scores")


@dataclass(frozen=True)
class Workspace:
    """A run's private checkout. started: seconds since 1970; changes: KEY=VALUE; error: the reason for a failure."""

    name: str
    home: str
    flow_run: str
    started: float
    changes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def root(self) -> Path:
        """The workspace's folder."""
        return Path(self.home) / RUNS / self.name

    @property
    def tag(self) -> str:
        """The git tag of the run's commit."""
        return TAG + self.name

    @property
    def running(self) -> bool:
        """Whether a run is active in it."""
        return is_held(self.root)


def open_workspace(home: Path, wanted: str, flow_run: str, changes: Iterable[str]) -> Workspace:
    """Create a worktree of `home` at its commit, with the changes (KEY=VALUE) in its params.yaml.

    wanted: the name of run and workspace; if it is taken, part of the `flow_run` id is appended. A retry of the same
    flow run reuses its workspace. FlowError if a change is invalid or git fails.
    """
    name = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-") or "run"
    for candidate in (name, f"{name}-{flow_run[:8]}"):
        space = Workspace(candidate, str(home), flow_run, time.time(), tuple(changes))
        if (found := _read(space.root)) and found.flow_run == flow_run:
            return found
        if not space.root.exists() and not git_says(home, "tag", "--list", space.tag):
            break
    else:
        raise FlowError(f"the run {name} already exists: {space.root}; see `modelpress runs`")
    git(home, "worktree", "add", "--quiet", "--detach", str(space.root), "HEAD")
    try:
        share_dvc(home, space.root, cache_folder(home))
        (space.root / LOCK).parent.mkdir(parents=True, exist_ok=True)
        for place in SHARED:
            (home / place).mkdir(parents=True, exist_ok=True)
            (space.root / place).symlink_to(home / place)
        _write(space)
        override(space.root / "params.yaml", list(space.changes))
    except BaseException:
        remove(space)
        raise
    return space


def commit(space: Workspace) -> str:
    """Commit and tag the run's results, except those of removed variants; return the commit."""
    stages = read_plan(space.root)
    forget_others(space.root, stages)
    outs = {out.path for stage in stages.values() for out in stage.outs}
    for path in (space.root / "metrics").rglob("*.json"):
        if path.relative_to(space.root).as_posix() not in outs:
            path.unlink()
    git(space.root, "add", "--all", "--force", "--", *KEPT)
    who = [] if git_says(space.root, "config", "user.email") else _NOBODY
    message = f"run {space.name}\n\n" + "\n".join(space.changes)
    git(space.root, *who, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--allow-empty", "--message", message)
    git(space.root, *who, "tag", "--force", "--no-sign", space.tag)
    return git(space.root, "rev-parse", "HEAD")


_NOBODY = ["-c", "user.name=modelpress", "-c", "user.email=modelpress@localhost"]


def fail(space: Workspace, error: str) -> None:
    """Save the reason for the failure in the workspace."""
    _write(replace(space, error=error))


def remove(space: Workspace) -> None:
    """Delete the workspace; its results stay in DVC's cache."""
    shutil.rmtree(space.root, ignore_errors=True)
    git(Path(space.home), "worktree", "prune")


def settings_at_commit(home: Path) -> Settings:
    """The committed params.yaml, as in a new workspace. FlowError if it is invalid."""
    try:
        return check_settings(yaml.safe_load(git(home, "show", "HEAD:params.yaml")), "params.yaml, as committed,")
    except TaskError as error:
        raise FlowError(str(error)) from error


def workspaces(home: Path) -> list[Workspace]:
    """All workspaces, oldest first."""
    folders = (home / RUNS).iterdir() if (home / RUNS).is_dir() else ()
    return sorted((space for folder in folders if (space := _read(folder))), key=lambda space: space.started)


def tags(home: Path) -> list[str]:
    """The tags of finished runs, newest first."""
    return git_says(home, "tag", "--list", f"{TAG}*", "--sort=-creatordate").splitlines()


def _read(folder: Path) -> Workspace | None:
    try:
        values = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return Workspace(**{**values, "changes": tuple(values["changes"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(space: Workspace) -> None:
    path = space.root / ABOUT
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(space), indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
