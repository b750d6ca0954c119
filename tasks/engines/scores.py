"""The score of a continuation, from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray


def score(logits: NDArray[numpy.float32], continuation: Sequence[int]) -> list[Any]:
    """Log-likelihood (nats) of a continuation, and whether it is the greedy one.

    logits: [tokens, vocabulary], those that predict each of its tokens.
    """
    best = logits.max(1)
    total = numpy.exp(logits - best[:, None]).sum(1, dtype=numpy.float64)
    chosen = logits[numpy.arange(len(continuation)), list(continuation)]
    logprob = (chosen - best).astype(numpy.float64) - numpy.log(total)
    return [float(logprob.sum()), bool((logits.argmax(1) == numpy.array(continuation)).all())]
