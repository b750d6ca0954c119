"""Log lines for the terminal: time | stage | message, without Prefect's state messages."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

OURS = Path(__file__).parents[1]  # flows/


class _Format(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s | %(stage)-20s | %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.stage = getattr(record, "task_run_name", None) or "modelpress"
        return super().format(record)


def _is_relevant(record: logging.LogRecord) -> bool:
    """Keep our lines and others' warnings, but not Prefect's failure messages: the command line prints the failure."""
    if OURS in Path(record.pathname).parents:
        return record.levelno >= logging.INFO
    engine = record.name.startswith(("prefect.flow_runs", "prefect.task_runs", "prefect._internal"))
    return record.levelno >= logging.WARNING and not engine


def readable_logs(stream: TextIO | None = None) -> None:
    """Write the logs of flows and stages to `stream` (default stderr) instead of Prefect's console lines."""
    import prefect  # noqa: F401 - installs the handlers that are replaced here

    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Format())
    handler.addFilter(_is_relevant)
    logging.getLogger().handlers = [handler]
