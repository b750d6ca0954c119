"""Set up a Dask worker for stages: `dask worker ADDRESS --preload flows.execution.dask_worker`."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

PATIENCE = 5.0  # seconds for the last logs to reach Prefect


def dask_setup(_worker: Any) -> None:
    """Ignore Ctrl-C, because the flow ends the stages and then the workers. Set up readable logs."""
    # a handler, because stages would inherit SIG_IGN
    signal.signal(signal.SIGINT, lambda *_: None)
    from flows.server.console_log import readable_logs

    readable_logs()


async def dask_teardown(_worker: Any) -> None:
    """Send pending logs and the last stage's state to Prefect."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for service in (APILogWorker, EventsWorker):
        waiting: Any = service.drain_all(timeout=PATIENCE)
        if asyncio.iscoroutine(waiting):
            await waiting
