"""Ask the work's side whether the settings can work, before any work is done."""

from __future__ import annotations

from pathlib import Path

from flows.errors import FlowError
from flows.processes.run_module import last_word, run_module

MODEL = "models/source"


def check_settings_work(root: Path, downloaded: bool) -> None:
    """FlowError with the reason if tasks/checks/preflight.py refuses.

    downloaded: the model is in `models/source`, and variants are checked against it.
    """
    status, lines = run_module(root, "tasks.checks.preflight", *([MODEL] if downloaded else []), own=True)
    if status:
        raise FlowError(last_word(lines, status))
