"""Fetch outputs of finished runs from DVC's cache, without changing any checkout."""

from __future__ import annotations

from pathlib import Path

from flows.errors import FlowError
from flows.processes.run_module import error_line, run_module


def fetch_output(home: Path, path: str, tag: str, target: Path) -> None:
    """Write the output `path` of the run `tag` to `target`; FlowError if neither DVC's cache nor its remote has it."""
    status, lines = run_module(home, "dvc", "get", str(home), path, "--rev", tag, "--out", str(target))
    if status:
        reason = error_line(lines, status)
        raise FlowError(f"cannot fetch {path} of {tag}: {reason}; `dvc pull` fetches it from a remote")
