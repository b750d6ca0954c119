"""What a finished run wrote, out of DVC's cache, without touching any checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flows.errors import FlowError
from flows.words import last_word, stage_environment


def fetch_output(home: Path, path: str, tag: str, target: Path) -> None:
    """Write the output `path` of the run `tag` to `target`; FlowError if DVC's cache and remote do not have it."""
    command = [sys.executable, "-P", "-m", "dvc", "get", str(home), path, "--rev", tag, "--out", str(target)]
    done = subprocess.run(
        command,
        cwd=home,
        env=stage_environment(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = last_word((done.stdout + done.stderr).splitlines(), done.returncode)
        raise FlowError(f"cannot fetch {path} of {tag}: {reason}; `dvc pull` gets what only a remote has")
