"""The queue, and the thread that generates: batches of the texts that wait together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .engine_process import EngineError, EngineProcess
from .errors import RequestError
from .metrics import Metrics
from .sequence import Failed, Sequence

GATHER = 0.005  # seconds in which requests that arrive together find each other
RETRY_AFTER = "1"  # seconds
LOGITS = 2**30  # bytes of the logits of a batch's prompts
FLOAT = 4


@dataclass(frozen=True)
class Limits:
    """rows: texts in a batch. tokens: of prompts and texts, padded, in a batch's KV cache. prompt_tokens: padded, of a
    batch's prompts. context: of one text and its prompt. queue: requests that may wait."""

    rows: int
    tokens: int
    prompt_tokens: int
    context: int
    queue: int


@dataclass(eq=False)
class Job:
    """The texts of one request."""

    sequences: list[Sequence]
    arrived: float = field(default_factory=time.monotonic)
    started: bool = False

    def cancel(self) -> None:
        """Stop generating; nothing more is sent."""
        for one in self.sequences:
            one.cancelled = True


class Scheduler:
    """Runs jobs in the order of their arrival, on a thread of its own."""

    def __init__(self, engine: EngineProcess, limits: Limits, metrics: Metrics) -> None:
        self._engine = engine
        self._limits = limits
        self._metrics = metrics
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Job, Sequence]] = deque()
        self._running: list[tuple[Job, Sequence]] = []
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. RequestError (503) if the queue is full or the server ends."""
        with self._changed:
            if self._ended:
                raise RequestError(503, "the server is shutting down", headers={"Retry-After": RETRY_AFTER})
            waiting = self._count_waiting()
            if waiting >= self._limits.queue:
                message = f"{waiting} requests are waiting, and no more than {self._limits.queue} may; try again later"
                raise RequestError(503, message, headers={"Retry-After": RETRY_AFTER})
            self._waiting.extend((job, one) for one in job.sequences)
            self._metrics.prompt_tokens.inc(sum(len(one.prompt) for one in job.sequences))
            self._update()
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Stop a job; its place in the queue is free at once."""
        job.cancel()
        with self._changed:
            self._waiting = deque((other, one) for other, one in self._waiting if other is not job)
            self._update()

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        with self._changed:
            return not self._waiting and not any(one.going for _, one in self._running)

    @property
    def alive(self) -> bool:
        """Whether the engine works."""
        return self._thread.is_alive() and self._engine.alive

    def end(self, reason: str) -> None:
        """Stop everything; jobs that have not ended fail with this reason."""
        with self._changed:
            self._ended = True
            left = [one for _, one in (*self._waiting, *self._running)]
            self._waiting.clear()
            self._changed.notify_all()
        for one in left:
            one.finish(Failed(503, reason))
        self._thread.join(timeout=10)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if self._ended:
                    return
                if len(self._waiting) < self._limits.rows:
                    self._changed.wait_for(lambda: self._ended, timeout=GATHER)
                self._running = self._next_batch()
                self._update()
            batch = [one for _, one in self._running]
            if batch:
                self._metrics.batch_rows.observe(len(batch))
                self._generate(batch)
            with self._changed:
                self._running = []
                self._update()

    def _generate(self, batch: list[Sequence]) -> None:
        try:
            self._engine.run(batch)
        except EngineError as error:
            for one in batch:
                one.finish(Failed(500, str(error)))

    def _next_batch(self) -> list[tuple[Job, Sequence]]:
        """Take the first waiting text and those that can run beside it."""
        batch: list[tuple[Job, Sequence]] = []
        left: deque[tuple[Job, Sequence]] = deque()
        for job, one in self._waiting:
            if not one.going:
                continue
            if not batch or self._fit([*(other for _, other in batch), one]):
                batch.append((job, one))
            else:
                left.append((job, one))
        self._waiting = left
        now = time.monotonic()
        for job, _ in batch:
            if not job.started:
                job.started = True
                self._metrics.queue_seconds.observe(now - job.arrived)
        return batch

    def _fit(self, sequences: list[Sequence]) -> bool:
        rows, prompt = len(sequences), max(len(one.prompt) for one in sequences)
        length = prompt + max(one.most for one in sequences)
        return (
            rows <= self._limits.rows
            and length <= self._limits.context
            and rows * length <= self._limits.tokens
            and rows * prompt <= self._limits.prompt_tokens
            and not any(self._engine.padding in one.prompt for one in sequences)
        )

    def _count_waiting(self) -> int:
        return _count(job for job, _ in self._waiting)

    def _update(self) -> None:
        self._metrics.waiting.set(self._count_waiting())
        self._metrics.running.set(_count(job for job, _ in self._running))


def _count(jobs: Iterable[Job]) -> int:
    return len({id(job) for job in jobs})
