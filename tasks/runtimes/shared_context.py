"""Score all continuations of a context in one forward pass, where the model reads the context only once.

The continuations are branches behind one context, kept apart by an attention mask and positions of our own, so this is
correct only for some models: see tasks/runtimes/shared_proof.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tasks.runtimes import Question, Score


@torch.inference_mode()
def score_shared(model: Any, questions: Sequence[Question]) -> list[list[Score]]:
    """Score every continuation of every question, in order.

    Raises whatever the model raises if it does not take a mask of shape [rows, 1, tokens, tokens].
    """
    trees = [_Tree(question) for question in questions]
    longest = max(len(tree.ids) for tree in trees)
    ids = torch.zeros(len(trees), longest, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    # padding sees itself alone: a row of the mask that is all False has no softmax
    mask = torch.eye(longest, dtype=torch.bool).repeat(len(trees), 1, 1, 1)
    for row, tree in enumerate(trees):
        size = len(tree.ids)
        ids[row, :size] = torch.tensor(tree.ids)
        positions[row, :size] = torch.tensor(tree.positions)
        mask[row, 0, :size, :size] = tree.mask
    with _output_layer_reads(model, [tree.reads for tree in trees]):
        found = model(
            input_ids=ids.to(model.device),
            position_ids=positions.to(model.device),
            attention_mask=mask.to(model.device),
            use_cache=False,
        ).logits
    results = []
    for tree, rows in zip(trees, found[0].split([len(tree.reads) for tree in trees]), strict=True):
        logits = rows.float().log_softmax(-1)
        targets = torch.tensor(tree.targets, device=logits.device)
        chosen = logits.gather(1, targets[:, None])[:, 0].cpu()
        greedy = (logits.argmax(-1) == targets).cpu()
        results.append([Score(chosen[span].sum().item(), bool(greedy[span].all())) for span in tree.spans])
    return results


@contextmanager
def _output_layer_reads(model: Any, places: Sequence[Sequence[int]]) -> Iterator[None]:
    """Let the output layer read only these places of each row: [rows, tokens, hidden] -> [1, places, vocabulary].

    The output layer costs a fifth of a small model, so it runs only where a token is scored. What the model does before
    and after it (scaling, soft-capping) is elementwise and stays the model's own. `logits_to_keep` does not serve: it
    takes the same places in all rows.
    """
    layer = model.get_output_embeddings()
    own = vars(layer).get("forward")
    whole = layer.forward

    def read(hidden: Tensor) -> Tensor:
        return torch.cat([whole(hidden[row, where]) for row, where in enumerate(places)])[None]

    layer.forward = read
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


class _Tree:
    """A question as one sequence: the context, then each continuation as a branch that sees the context and itself.

    ids, positions: of the sequence. mask: bool [tokens, tokens]. reads: the places whose output scores a token,
    targets: that token; spans: each continuation's slice of the two.
    The last token of a continuation is scored but never read on from, so it is not in the sequence.
    """

    def __init__(self, question: Question) -> None:
        start = len(question.context)
        self.ids = list(question.context)
        self.positions = list(range(start))
        self.reads: list[int] = []
        self.targets: list[int] = []
        self.spans: list[slice] = []
        size = start + sum(len(c) - 1 for c in question.continuations)
        self.mask = torch.zeros(size, size, dtype=torch.bool)
        self.mask[:start, :start] = torch.ones(start, start, dtype=torch.bool).tril()
        for continuation in question.continuations:
            at, length = len(self.ids), len(continuation) - 1
            self.ids += continuation[:-1]
            self.positions += range(start, start + length)
            self.mask[at : at + length, :start] = True
            self.mask[at : at + length, at : at + length] = torch.ones(length, length, dtype=torch.bool).tril()
            self.spans.append(slice(len(self.targets), len(self.targets) + len(continuation)))
            self.reads += [start - 1, *range(at, at + length)]
            self.targets += continuation
