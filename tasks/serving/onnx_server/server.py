"""Run the server until it is told to end.

SIGTERM and SIGINT: new requests are refused with 503, the running ones may end within the time for draining, and then
the server ends; a second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from types import FrameType

import uvicorn

from .app import create_app
from .engine_process import EngineProcess
from .errors import StartError
from .gate import Gate
from .metrics import Metrics
from .options import Options, read_options
from .scheduler import FLOAT, LOGITS, Limits, Scheduler
from .served import read_served

_LOG = logging.getLogger("uvicorn.error")


def serve(options: Options) -> None:
    """Load the model and answer requests. StartError if the server cannot start."""
    served = read_served(options)
    export = served.export
    engine = EngineProcess(options.model, served.vocabulary.padding(export), export.vocabulary, options.threads)
    limits = Limits(
        rows=options.max_batch,
        tokens=options.kv_cache // export.cache_bytes,
        prompt_tokens=LOGITS // (export.vocabulary * FLOAT),
        context=served.context,
        queue=options.max_queue,
    )
    metrics = Metrics(engine.pid)
    scheduler = Scheduler(engine, limits, metrics)
    app = create_app(served, scheduler, metrics, engine.version)
    paths = {getattr(route, "path", "") for route in app.routes}
    gate = Gate(app, options.keys, options.max_body, paths, metrics)
    config = uvicorn.Config(
        gate,
        host=options.host,
        port=options.port,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    try:
        _Server(config, gate, scheduler, options.drain).run()
        if not engine.alive:
            raise StartError(engine.ended())
    finally:
        engine.close()


class _Server(uvicorn.Server):
    """Drains before it ends."""

    def __init__(self, config: uvicorn.Config, gate: Gate, scheduler: Scheduler, drain: float) -> None:
        super().__init__(config)
        self._gate = gate
        self._scheduler = scheduler
        self._drain = drain
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at a second signal, end."""
        if self._until is not None:
            self._until = 0.0
            return
        self._gate.closing = True
        self._until = time.monotonic() + self._drain
        _LOG.info("draining for up to %g s", self._drain)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second by uvicorn; True ends the server."""
        if not self._scheduler.alive:
            return True
        if self._until is not None:
            late = time.monotonic() >= self._until
            if late or self._scheduler.idle:
                await asyncio.to_thread(self._scheduler.end, "the server has shut down before this text was complete")
                return True
        return await super().on_tick(counter)


def main() -> None:
    """Read the command line and serve; an error is one line."""
    try:
        serve(read_options())
    except StartError as error:
        sys.exit(f"error: {error}")
