"""A server of completions with set speeds, for tests of the load test."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from tasks.serving.process import free_port


class TimedServer:
    """It streams tokens at set times after a request's arrival.

    first, each: seconds to the first token and for each further one. spread: of the random factor of a request's times
    (standard deviation of its logarithm; seeded). fails: every so manieth request gets status 500; short: every so
    manieth answer lacks a token; 0: none. ends_after: the server ends in the middle of this request.
    """

    engine = "timed server"

    def __init__(
        self,
        name: str = "model",
        first: float = 0.02,
        each: float = 0.005,
        *,
        spread: float = 0.0,
        seed: int = 0,
        fails: int = 0,
        short: int = 0,
        ends_after: int | None = None,
    ) -> None:
        self.name, self.first, self.each = name, first, each
        self.spread, self.random = spread, np.random.default_rng(seed)
        self.fails, self.short, self.ends_after = fails, short, ends_after
        self.asked: list[dict[str, Any]] = []
        self.working = self.most_at_once = 0
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(self._app(), host="127.0.0.1", port=port, log_level="critical")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    @property
    def alive(self) -> bool:
        return not self.server.should_exit

    def cpu_seconds(self) -> float:
        return 0.5 * len(self.asked)

    def last_words(self) -> str:
        return "" if self.alive else "RuntimeError: no memory left"

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/completions")
        async def complete(request: Request) -> StreamingResponse:
            body = await request.json()
            self.asked.append(body)
            number = len(self.asked)
            if number == self.ends_after:
                self.server.should_exit = self.server.force_exit = True
                raise HTTPException(503, "ending")
            if not self.alive or (self.fails and number % self.fails == 0):
                raise HTTPException(500, "broken")
            tokens = body["max_tokens"] - (1 if self.short and number % self.short == 0 else 0)
            factor = float(np.exp(self.spread * self.random.standard_normal()))
            return StreamingResponse(self._stream(tokens, factor), media_type="text/event-stream")

        return app

    async def _stream(self, tokens: int, factor: float) -> AsyncIterator[str]:
        started = time.perf_counter()
        self.working += 1
        self.most_at_once = max(self.most_at_once, self.working)
        for number in range(tokens):
            due = started + factor * (self.first + number * self.each)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            yield _event({"choices": [{"index": 0, "text": " a"}]})
        self.working -= 1
        yield _event({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": tokens}})
        yield "data: [DONE]\n\n"


def _event(part: dict[str, Any]) -> str:
    return f"data: {json.dumps({'id': 'x', 'object': 'text_completion', **part})}\n\n"


@contextmanager
def answering(*servers: TimedServer) -> Iterator[tuple[TimedServer, ...]]:
    """Run the servers, and end them."""
    for server in servers:
        server.thread.start()
    deadline = time.monotonic() + 30
    while not all(server.server.started for server in servers):
        assert time.monotonic() < deadline, "a test server did not start"
        time.sleep(0.02)
    try:
        yield servers
    finally:
        for server in servers:
            server.server.should_exit = server.server.force_exit = True
        for server in servers:
            server.thread.join(10)
