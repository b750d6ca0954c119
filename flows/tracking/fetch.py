"""`modelpress get`: fetch the package of a finished run from DVC's cache, and verify its checksums."""

from __future__ import annotations

from pathlib import Path

from flows.errors import FlowError
from flows.graph.params_file import package_name
from flows.tracking.registry import CHAMPION, champion_tag
from flows.workspace.git import git
from flows.workspace.outputs import fetch_output
from flows.workspace.worktree import TAG, tags
from tasks.bundle.checksums import check_sums
from tasks.errors import TaskError


def package_path(home: Path, tag: str) -> str:
    """The package's path in the run's checkout; FlowError if there is no such run."""
    if tag not in tags(home):
        some = ", ".join(tags(home)[:5]) or "none yet"
        raise FlowError(f"no finished run {tag}; finished runs: {some}")
    params = f"{tag}:params.yaml"
    return f"dist/{package_name(git(home, 'show', params), params)}"


def run_tag(home: Path, what: str) -> str:
    """The tag run/NAME for NAME or run/NAME; or that of the champion, of the package name in params.yaml.

    FlowError if there is no such run.
    """
    tag = what
    if what == CHAMPION:
        params = home / "params.yaml"
        tag = champion_tag(home, package_name(params.read_text(encoding="utf-8"), str(params)))
    tag = tag if tag.startswith(TAG) else TAG + tag
    package_path(home, tag)
    return tag


def fetch_package(home: Path, tag: str, destination: Path | None) -> Path:
    """Write the package of the run `tag` to `destination`, a new folder that is by default named like the package.

    The tag `champion` is resolved in MLflow's registry, for the package name in params.yaml.

    FlowError if there is no such run, the folder exists, or the files do not match their SHA256SUMS.
    """
    tag = run_tag(home, tag)
    path = package_path(home, tag)
    target = (destination or Path(Path(path).name)).resolve()
    if target.exists():
        raise FlowError(f"{target} already exists; name another folder with --to, or remove it")
    fetch_output(home, path, tag, target)
    try:
        check_sums(target)
    except TaskError as error:
        raise FlowError(f"{error}; `modelpress doctor --repair` finds damage in DVC's cache") from error
    return target
