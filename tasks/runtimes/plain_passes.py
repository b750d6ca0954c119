"""Score continuations by plain forward passes: the model sees each context and continuation as an ordinary text."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tasks.runtimes import Question, Score


def score_plainly(
    model: Any, questions: Sequence[Question], batch_tokens: int, done: Callable[[int], object] = lambda count: None
) -> list[list[Score]]:
    """Score every continuation of every question, in order; `done` is told the number of questions newly finished.

    A batch holds rows of equal length, without padding. So no mask, position or padding of ours takes part, and models
    with recurrent state, or whose positions depend on the length of a batch, see what they see in a single row.
    """
    results = [[Score(0.0, greedy=False)] * len(question.continuations) for question in questions]
    open_rows = [len(question.continuations) for question in questions]
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for index, question in enumerate(questions):
        for number, continuation in enumerate(question.continuations):
            by_length[len(question.context) + len(continuation) - 1].append((index, number))
    for length in sorted(by_length, reverse=True):  # longest first: if memory does not suffice, it shows at once
        rows = by_length[length]
        size = max(1, batch_tokens // length)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            pairs = [(questions[index].context, questions[index].continuations[number]) for index, number in batch]
            for (index, number), score in zip(batch, _score(model, pairs), strict=True):
                results[index][number] = score
                open_rows[index] -= 1
                done(open_rows[index] == 0)
    return results


@torch.inference_mode()
def _score(model: Any, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Score]:
    """Score pairs of a context and a continuation; all have the same number of tokens to read."""
    # the last token of a continuation is scored, but not an input
    ids = torch.tensor([[*context, *continuation[:-1]] for context, continuation in pairs])
    longest = max(len(continuation) for _, continuation in pairs)
    options = {"logits_to_keep": longest} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    found = model(input_ids=ids.to(model.device), use_cache=False, **options).logits
    scores = []
    for row, (_, continuation) in zip(found, pairs, strict=True):
        logits = row[-len(continuation) :].float().log_softmax(-1)
        targets = torch.tensor(continuation, device=logits.device)
        chosen = logits.gather(1, targets[:, None])[:, 0].cpu()
        scores.append(Score(chosen.sum().item(), bool((logits.argmax(-1) == targets).all())))
    return scores
