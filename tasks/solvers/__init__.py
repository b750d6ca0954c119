"""Solvers: from a layer's weight and the statistics of its input to integers, scales and zero points.

Pure functions, one layer at a time; none of them runs the model. All rest on one fact: for a linear layer with inputs
X, a change D of its weight costs ||X D^T||^2 = trace(D H D^T), with H = X^T X the Gram matrix of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PART = 1 << 21  # numbers of a weight that are worked on together: what is made of them stays in a processor's cache


def row_parts(weight: Tensor, most: int = PART) -> list[slice]:
    """The rows of `weight` [rows, width] a few at a time, at most so many, for work that does each by itself.

    What is made of all rows of a large layer is memory that the system must give first, again and again: to search its
    clips took twice as long.
    """
    step = max(1, min(PART // weight.shape[1], most))
    return [slice(start, start + step) for start in range(0, len(weight), step)]


@contextmanager
def one_thread() -> Iterator[None]:
    """For factorizations of matrices: the last bits of LAPACK's results depend on the number of threads.

    Those of products do not in a stage: set_environment in tasks/program.py.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def damped(gram: Tensor, share: float) -> Tensor:
    """`gram` [width, width] with `share` of its mean diagonal added to its diagonal."""
    gram = gram.clone()
    gram.diagonal().add_(share * gram.diagonal().mean())
    return gram


def output_error(change: Tensor, gram: Tensor) -> Tensor:
    """What a change [rows, width] of a weight does to each output, squared and summed over the tokens: [rows]."""
    return ((change @ gram) * change).sum(-1)
