"""Ask the work's side whether the settings can work, before any work is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flows.errors import FlowError
from flows.words import last_word, stage_environment

MODEL = "models/source"


def check_settings_work(root: Path, downloaded: bool) -> None:
    """FlowError with the reason if tasks/check.py refuses; with `downloaded`, variants are held against the model."""
    if not (root / "tasks/check.py").is_file():
        return
    done = subprocess.run(
        [sys.executable, "-m", "tasks.check", *([MODEL] if downloaded else [])],
        cwd=root,
        env=stage_environment(os.environ),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise FlowError(last_word((done.stdout + done.stderr).splitlines(), done.returncode))
