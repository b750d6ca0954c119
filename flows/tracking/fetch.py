"""`modelpress get`: fetch the package of a finished run from DVC's cache, and verify its checksums."""

from __future__ import annotations

from pathlib import Path

from flows.errors import FlowError
from flows.graph.params_file import package_of
from flows.tracking.registry import CHAMPION, champion_tag
from flows.workspace.git import git
from flows.workspace.outputs import fetch_output
from flows.workspace.worktree import TAG, tags
from tasks.bundle.checksums import check_sums
from tasks.errors import TaskError


def package_path(home: Path, tag: str, target: str | None) -> str:
    """The path in the run's checkout of its package for `target`, or of the only one; FlowError if there is none."""
    if tag not in tags(home):
        some = ", ".join(tags(home)[:5]) or "none yet"
        raise FlowError(f"no finished run {tag}; finished runs: {some}")
    params = f"{tag}:params.yaml"
    return f"dist/{package_of(git(home, 'show', params), params, target)}"


def run_tag(home: Path, what: str, target: str | None = None) -> str:
    """The tag run/NAME for NAME or run/NAME; or that of the champion for `target`, of the package in params.yaml.

    FlowError if there is no such run, or no package for `target` in it.
    """
    tag = what
    if what == CHAMPION:
        params = home / "params.yaml"
        tag = champion_tag(home, package_of(params.read_text(encoding="utf-8"), str(params), target))
    tag = tag if tag.startswith(TAG) else TAG + tag
    package_path(home, tag, target)
    return tag


def fetch_package(home: Path, tag: str, destination: Path | None, target: str | None = None) -> Path:
    """Write a run's package for `target` to `destination`, a new folder that is by default named like the package.

    The tag `champion` is resolved in MLflow's registry, for the package name in params.yaml.

    FlowError if there is no such run, the folder exists, or the files do not match their SHA256SUMS.
    """
    tag = run_tag(home, tag, target)
    path = package_path(home, tag, target)
    place = (destination or Path(Path(path).name)).resolve()
    if place.exists():
        raise FlowError(f"{place} already exists; name another folder with --to, or remove it")
    fetch_output(home, path, tag, place)
    try:
        check_sums(place)
    except TaskError as error:
        raise FlowError(f"{error}; `modelpress doctor --repair` finds damage in DVC's cache") from error
    return place
