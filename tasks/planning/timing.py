"""Time work on miniatures of a model and scale it: fixed + layers * layer + outer.

Two models with almost no weights, one with one layer and one with two, give `fixed`. A layer of the model's own widths
gives `layer`. A model with a large part of the vocabulary and almost no layer gives `outer`: embedding, output layer.

A layer of a mixture is measured with the experts that one token visits. What is done once, such as loading or pressing
it, is scaled to the weights of all experts; what is done again for more tokens, to the weights that a token visits.
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
    """Seconds. rough: the layer was extrapolated from narrower ones, or from a few experts."""

    fixed: float
    layer: float
    outer: float
    rough: bool


class Bench:
    """Miniatures of one model. config: of the layers that one token passes through (miniature.py); weights: of one
    decoder layer, and those that a token visits; deadline: by time.monotonic()."""

    def __init__(self, root: Path, config: Any, dtype: str, weights: tuple[int, int], deadline: float) -> None:
        self.all, self.visited = weights
        self.deadline = deadline
        self._clock = time.perf_counter if compute_device() == "cuda" else time.thread_time
        self.one, self.two = (Miniature(root, narrowed(config, 10**6, layers), dtype) for layers in (1, 2))
        whole = config.hidden_size
        narrow = {small.hidden_size: small for small in (narrowed(config, factor) for factor in FACTORS)}
        smallest = min(SMALL, self.visited)
        sizes = [size for size in narrow if smallest <= self.visited * (size / whole) ** 2 <= LARGEST]
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
        fixed = max(0.0, min(2 * sum(one) - sum(two), sum(one)))
        again = max(0.0, min(2 * one[1] - two[1], one[1]))  # the part of `fixed` that is done again
        rungs, spent = [(self.one.weights, one[0] - (fixed - again), one[1] - again)], 0.0
        for mini in filter(known, self.ladder):
            began = time.monotonic()
            if began + spent * mini.weights / rungs[-1][0] > until:
                break
            try:
                once, more = self._seconds(work, count, mini)
            except TaskError:  # the group size does not divide the narrower widths
                continue
            rungs.append((mini.weights, once - (fixed - again), more - again))
            spent = time.monotonic() - began
        if outer is None:
            try:
                outer = max(0.0, sum(self._seconds(work, count, self.thin)) - sum(one)) * self._more
            except TaskError:
                outer = 0.0
        rough = rungs[-1][0] < self.all
        return Cost(fixed, self._layer(rungs[-2:]), outer, rough)

    def _layer(self, rungs: list[tuple[int, float, float]]) -> float:
        """Seconds of a layer, from the widest layers measured: weights, and seconds of what is done once and again."""
        if self.all == self.visited:
            return _scaled([(weights, max(0.0, once + again)) for weights, once, again in rungs], self.all)
        found = _scaled([(weights, max(0.0, once)) for weights, once, _ in rungs], self.all, self.visited)
        return found + _scaled([(weights, max(0.0, again)) for weights, _, again in rungs], self.visited)

    def _seconds(self, work: Work, count: float, mini: Miniature) -> tuple[float, float]:
        """The time of doing it `count` times, from once and several times: what is done once, and what is done again.

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
            return once, 0.0
        more = 2 if once > LONG else 3
        each = max(0.0, (seconds(more) - once) / (more - 1))
        first = max(0.0, once - each)
        return first, once + (count - 1) * each - first


def _scaled(rungs: list[tuple[int, float]], weights: int, visited: int | None = None) -> float:
    """Seconds for `weights`, from the widest layers measured, (weights, seconds) each. visited: the weights of a layer
    of the model's own widths with the experts of one token, where `weights` are those of all experts.

    Work on each weight grows with the number of weights, products of their matrices with its power 1.5. Further experts
    take as long as the first.
    """
    (small, less), (large, more) = rungs[0], rungs[-1]
    products, wide = 0.0, visited or weights
    if small < large < wide:
        products = min(max(0.0, (more / large - less / small) / (large**0.5 - small**0.5)), more / large**1.5)
    return float(products * wide**1.5 + (more - products * large**1.5) * wide / large) * weights / wide
