"""Set up a Dask worker that runs stages: `dask worker ADDRESS --preload flows.execution.dask_worker`."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

PATIENCE = 5.0  # seconds for the last logs to reach Prefect


def dask_setup(_worker: Any) -> None:
    """Leave Ctrl-C to the flow, which ends the stages in order and then the workers; write readable lines."""
    # a handler, not SIG_IGN, which the stages would inherit
    signal.signal(signal.SIGINT, lambda *_: None)
    from flows.server.console_log import readable_logs

    readable_logs()


async def dask_teardown(_worker: Any) -> None:
    """Send what Prefect has not been told yet: the last lines, and that the last stage has ended."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for service in (APILogWorker, EventsWorker):
        waiting: Any = service.drain_all(timeout=PATIENCE)
        if asyncio.iscoroutine(waiting):
            await waiting
