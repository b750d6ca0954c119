"""Solvers: from a layer's weight and the statistics of its input to integers, scales and zero points.

Pure functions on one layer; none runs the model. For a linear layer with inputs X, a change D of its weight causes the
output error ||X D^T||^2 = trace(D H D^T), with the Gram matrix H = X^T X of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PART = 1 << 21  # elements of a weight processed at once, so that intermediate results fit into the processor's cache


def row_parts(weight: Tensor, most: int = PART) -> list[slice]:
    """Split the rows of `weight` [rows, width] into slices of at most `most` elements, for row-wise work.

    Processing all rows of a large layer at once allocates fresh memory again and again: the clip search took twice as
    long.
    """
    step = max(1, min(PART // weight.shape[1], most))
    return [slice(start, start + step) for start in range(0, len(weight), step)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, for matrix factorizations: the last bits of LAPACK's results depend on the number of threads.

    Those of matrix products do not: set_environment in tasks/determinism.py.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def damped(gram: Tensor, share: float) -> Tensor:
    """Add `share` of the mean diagonal of `gram` [width, width] to its diagonal."""
    gram = gram.clone()
    gram.diagonal().add_(share * gram.diagonal().mean())
    return gram


def output_error(change: Tensor, gram: Tensor) -> Tensor:
    """The squared error of each output, [rows], summed over tokens, for a weight change [rows, width]."""
    return ((change @ gram) * change).sum(-1)
