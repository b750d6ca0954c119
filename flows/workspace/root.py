"""Find the project's folder."""

from __future__ import annotations

from pathlib import Path

from flows.errors import FlowError


def find_root() -> Path:
    """The current folder or its closest parent that contains dvc.yaml; FlowError if there is none."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise FlowError(f"no dvc.yaml in {here} or above it; run in the project's folder")
