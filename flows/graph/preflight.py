"""Run the settings check of tasks/ before any work starts."""

from __future__ import annotations

from pathlib import Path

from flows.errors import FlowError
from flows.processes.run_module import error_line, run_module

MODEL = "models/source"
PROGRAM = "tasks.checks.preflight"
FILE = Path("tasks/checks/preflight.py")


def check_settings_work(root: Path, downloaded: bool, elsewhere: bool = False) -> None:
    """Check the settings in `root`; FlowError if the checkout's tasks/checks/preflight.py fails or is missing.

    downloaded: whether the model is in `models/source`, so that variants can be checked against it. elsewhere: whether
    the stages run on other machines, so that this one's memory does not count.
    """
    if not (root / FILE).is_file():
        raise FlowError(
            f"{root} has no {FILE}, which checks the settings before work starts; run in a complete checkout of the "
            f"project, or restore the file: git checkout -- {FILE}"
        )
    arguments = ["--elsewhere"] * elsewhere + [MODEL] * downloaded
    status, lines = run_module(root, PROGRAM, *arguments, own=True)
    if status:
        raise FlowError(error_line(lines, status))
