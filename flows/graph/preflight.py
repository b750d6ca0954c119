"""Ask the work's side whether the settings can work, before any work is done."""

from __future__ import annotations

from pathlib import Path

from flows.errors import FlowError
from flows.programs import run_module
from flows.words import last_word

MODEL = "models/source"


def check_settings_work(root: Path, downloaded: bool) -> None:
    """FlowError with the reason if tasks/check.py refuses; with `downloaded`, variants are held against the model."""
    if not (root / "tasks/check.py").is_file():
        return
    status, lines = run_module(root, "tasks.check", *([MODEL] if downloaded else []), own=True)
    if status:
        raise FlowError(last_word(lines, status))
