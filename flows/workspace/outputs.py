"""What a finished run wrote, out of DVC's cache, without touching any checkout."""

from __future__ import annotations

from pathlib import Path

from flows.errors import FlowError
from flows.processes.run_module import error_line, run_module


def fetch_output(home: Path, path: str, tag: str, target: Path) -> None:
    """Write the output `path` of the run `tag` to `target`; FlowError if DVC's cache and remote do not have it."""
    status, lines = run_module(home, "dvc", "get", str(home), path, "--rev", tag, "--out", str(target))
    if status:
        reason = error_line(lines, status)
        raise FlowError(f"cannot fetch {path} of {tag}: {reason}; `dvc pull` gets what only a remote has")
