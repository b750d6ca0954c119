"""Time work on miniatures of a model and scale it: fixed + layers * layer + outer.

Two models with almost no weights, one with one layer and one with two, give `fixed`. A layer of the model's own widths
gives `layer`. A model with a large part of the vocabulary and almost no layer gives `outer`: embedding, output layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.device import compute_device
from tasks.errors import TaskError
from tasks.planning.miniature import Miniature, narrowed, thin

LARGEST = 64_000_000  # weights of the largest layer to measure: pressing it takes 3.5 GB
SMALL = 4_000_000  # weights of a layer that takes little time: narrower ones are not measured
OUTER = 10_000_000  # weights of the embedding that is measured
LONG = 0.3  # seconds of work that is timed well by itself
FACTORS = (16, 8, 4, 2, 1)  # of narrower layers, and of the whole one

Work = Callable[[Miniature, int], object]  # does something on a miniature a number of times; at 0, only prepares it


@dataclass(frozen=True)
class Cost:
    """Seconds. rough: the layer was extrapolated from narrower ones."""

    fixed: float
    layer: float
    outer: float
    rough: bool


class Bench:
    """Miniatures of one model. weights: of one decoder layer; deadline: by time.monotonic()."""

    def __init__(self, root: Path, config: Any, dtype: str, weights: int, deadline: float) -> None:
        self.weights = weights
        self.deadline = deadline
        self._clock = time.perf_counter if compute_device() == "cuda" else time.thread_time
        self.one, self.two = (Miniature(root, narrowed(config, 10**6, layers), dtype) for layers in (1, 2))
        whole = config.hidden_size
        narrow = {small.hidden_size: small for small in (narrowed(config, factor) for factor in FACTORS)}
        smallest = min(SMALL, weights)
        sizes = [size for size in narrow if smallest <= weights * (size / whole) ** 2 <= LARGEST]
        self.ladder = [Miniature(root, narrow[size], dtype) for size in sizes]
        words = min(config.vocab_size, OUTER // whole)
        self.thin, self._more = Miniature(root, thin(config, words), dtype), config.vocab_size / words

    def cost(
        self, work: Work, count: float, share: float, known: Callable[[Miniature], bool], outer: float | None
    ) -> Cost:
        """The cost of doing `work` `count` times.

        share: of the remaining time that may be spent. known: whether a miniature may be used. outer: if known already.
        TaskError if no time is left.
        """
        until = time.monotonic() + share * (self.deadline - time.monotonic())
        if until < time.monotonic():
            raise TaskError("no time was left to measure it; try again when the machine is less busy")
        one, two = (self._seconds(work, count, mini) for mini in (self.one, self.two))
        fixed = max(0.0, min(2 * one - two, one))
        rungs, spent = [(self.one.weights, one - fixed)], 0.0
        for mini in filter(known, self.ladder):
            began = time.monotonic()
            if spent and began + spent * mini.weights / rungs[-1][0] > until:
                break
            try:
                rungs.append((mini.weights, max(0.0, self._seconds(work, count, mini) - fixed)))
            except TaskError:  # the group size does not divide the narrower widths
                continue
            spent = time.monotonic() - began
        if outer is None:
            try:
                outer = max(0.0, self._seconds(work, count, self.thin) - one) * self._more
            except TaskError:
                outer = 0.0
        return Cost(fixed, _layer(rungs[-2:], self.weights), outer, rungs[-1][0] < self.weights)

    def _seconds(self, work: Work, count: float, mini: Miniature) -> float:
        """The time of doing it `count` times, from once and several times.

        On a CPU, the processor time of the main thread: other programs do not add to it, and idle OpenMP threads do not
        spin (OMP_WAIT_POLICY), so it covers the main thread's part of shared work.
        """

        def seconds(times: int) -> float:
            began = self._clock()
            work(mini, times)
            return self._clock() - began

        work(mini, 0)
        once = seconds(1)
        if count <= 1:
            return once
        more = 2 if once > LONG else 3
        return once + (count - 1) * max(0.0, (seconds(more) - once) / (more - 1))


def _layer(rungs: list[tuple[int, float]], weights: int) -> float:
    """Seconds of a layer with `weights`, from the widest layers measured, (weights, seconds) each.

    Work on each weight grows with the number of weights, products of their matrices with its power 1.5.
    """
    (small, less), (large, more) = rungs[0], rungs[-1]
    products = 0.0
    if small < large < weights:
        products = min(max(0.0, (more / large - less / small) / (large**0.5 - small**0.5)), more / large**1.5)
    return float(products * weights**1.5 + (more - products * large**1.5) * weights / large)
