"""Batch questions of similar length, to waste little work on padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tasks.runtimes import Question


def batches(questions: Sequence[Question], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of questions of similar length, longest first, with a padded size within `batch_tokens`."""
    sizes = [len(q.context) + sum(len(c) - 1 for c in q.continuations) for q in questions]
    order = sorted(range(len(questions)), key=lambda i: -sizes[i])
    while order:
        # at least one, even if longer
        count = max(1, min(len(order), batch_tokens // sizes[order[0]]))
        yield order[:count]
        order = order[count:]
