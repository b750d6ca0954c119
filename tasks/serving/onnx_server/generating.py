"""Generate the texts of one request, and cancel them when the client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .answers import ChatAnswer, CompletionAnswer
from .errors import RequestError
from .metrics import Metrics
from .output import Output, Piece
from .reading import Prompt, make_sequence, stop_strings
from .scheduler import Job, Scheduler
from .schemas import Chat, Completion
from .sequence import Ended, Event, Failed
from .served import Served

GONE = 499  # the client closed the connection; only in metrics, because nobody reads it


class Generator:
    """Runs requests on a scheduler."""

    def __init__(self, served: Served, scheduler: Scheduler, metrics: Metrics) -> None:
        self._served = served
        self._scheduler = scheduler
        self._metrics = metrics

    async def answer(self, http: Request, request: Completion | Chat, prompts: list[Prompt]) -> Response:
        """The answer to a request with n texts after each of the prompts."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def send(index: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(queue.put_nowait, (index, event))

        stops = stop_strings(request)
        outputs = [
            Output(
                make_sequence(request, prompt, number, self._served, partial(send, place * request.n + number)),
                self._served.vocabulary,
                stops,
                request.include_stop_str_in_output,
                request.skip_special_tokens,
                frozenset(self._served.export.ends),
            )
            for place, prompt in enumerate(prompts)
            for number in range(request.n)
        ]
        count = sum(map(len, prompts))
        answer: ChatAnswer | CompletionAnswer
        if isinstance(request, Chat):
            answer = ChatAnswer(self._served, outputs, request=request)
        else:
            answer = CompletionAnswer(self._served, outputs, request=request)
        job = Job([output.sequence for output in outputs])
        self._scheduler.submit(job)
        pieces = self._pieces(job, outputs, queue)
        if request.stream:
            usage = bool(request.stream_options and request.stream_options.include_usage)
            # the first event decides about the status
            try:
                first = await anext(pieces)
            except RequestError:
                await _close(pieces)
                raise
            chunks = self._chunks(answer, first, pieces, count if usage else None)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        whole = await _unless_gone(http, _gather(pieces, len(outputs)))
        if whole is None:
            self._scheduler.cancel(job)
            return Response(status_code=GONE)
        return JSONResponse(answer.whole(whole, count))

    async def _pieces(
        self, job: Job, outputs: list[Output], queue: asyncio.Queue[tuple[int, Event]]
    ) -> AsyncIterator[tuple[int, Piece]]:
        """Yield each text's pieces, until all texts have ended. RequestError if one fails."""
        last: dict[int, float] = {}
        try:
            while not all(output.ended for output in outputs):
                index, event = await queue.get()
                output = outputs[index]
                if output.ended:  # by a stop string; the engine learns it later
                    continue
                if isinstance(event, Failed):
                    raise RequestError(event.status, event.message)
                now = time.monotonic()
                piece = output.end() if isinstance(event, Ended) else output.add(event)
                if output.count:
                    self._count(now, job, last.get(index), output.count)
                    last[index] = now
                if piece is None:
                    continue
                if piece.finish is not None:
                    output.sequence.cancelled = True
                    self._metrics.finished.labels(piece.finish).inc()
                yield index, piece
            self._metrics.request_seconds.observe(time.monotonic() - job.arrived)
        finally:
            self._scheduler.cancel(job)

    def _count(self, now: float, job: Job, before: float | None, count: int) -> None:
        self._metrics.generation_tokens.inc()
        if before is not None:
            self._metrics.between_tokens.observe(now - before)
        elif count == 1:
            self._metrics.first_token.observe(now - job.arrived)

    async def _chunks(
        self,
        answer: ChatAnswer | CompletionAnswer,
        first: tuple[int, Piece],
        pieces: AsyncIterator[tuple[int, Piece]],
        usage: int | None,
    ) -> AsyncIterator[str]:
        """Server-sent events. usage: tokens of the prompts, if the usage is wanted."""
        begun: set[int] = set()
        try:
            async for index, piece in _chain(first, pieces):
                if index not in begun:
                    begun.add(index)
                    for chunk in answer.first(index):
                        yield _event(chunk)
                yield _event(answer.chunk(index, piece))
            if usage is not None:
                yield _event(answer.last(usage))
        except RequestError as error:
            yield _event(error.body())
        finally:
            await _close(pieces)
        yield "data: [DONE]\n\n"


async def _chain(first: tuple[int, Piece], rest: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    yield first
    async for one in rest:
        yield one


async def _close(pieces: Any) -> None:
    await pieces.aclose()


async def _gather(pieces: AsyncIterator[tuple[int, Piece]], count: int) -> list[Piece]:
    """All pieces of each text as one."""
    found: list[list[Piece]] = [[] for _ in range(count)]
    try:
        async for index, piece in pieces:
            found[index].append(piece)
    finally:
        await _close(pieces)
    return [
        Piece(
            "".join(piece.text for piece in all_of),
            tuple(token for piece in all_of for token in piece.tokens),
            all_of[-1].finish,
            all_of[-1].stop,
        )
        for all_of in found
    ]


async def _unless_gone(http: Request, work: Any) -> list[Piece] | None:
    """The result of `work`; None if the client closes the connection first, and then `work` is cancelled."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http.receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            found: list[Piece] = working.result()
            return found
        return None
    finally:
        for task in (working, gone):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _disconnected(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"
