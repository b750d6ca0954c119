"""Questions of like length together: what is filled up to the longest is work for nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tasks.runtimes import Question


def batches(questions: Sequence[Question], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of questions of like length, longest first, whose padded size stays within `batch_tokens`."""
    sizes = [len(q.context) + sum(len(c) - 1 for c in q.continuations) for q in questions]
    order = sorted(range(len(questions)), key=lambda i: -sizes[i])
    while order:
        # at least one, however long
        count = max(1, min(len(order), batch_tokens // sizes[order[0]]))
        yield order[:count]
        order = order[count:]
