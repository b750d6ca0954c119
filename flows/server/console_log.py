"""Log lines for a person at a terminal: time | stage | message, without the state machinery of Prefect."""

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


def _worth_reading(record: logging.LogRecord) -> bool:
    """Our own lines, and warnings of others; how a run failed is said once, by the command line."""
    if OURS in Path(record.pathname).parents:
        return record.levelno >= logging.INFO
    engine = record.name.startswith(("prefect.flow_runs", "prefect.task_runs", "prefect._internal"))
    return record.levelno >= logging.WARNING and not engine


def readable_logs(stream: TextIO | None = None) -> None:
    """Write the logs of flows and stages to `stream` (stderr) in place of Prefect's own console lines."""
    import prefect  # noqa: F401 - sets up the handlers that are replaced here

    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Format())
    handler.addFilter(_worth_reading)
    logging.getLogger().handlers = [handler]
