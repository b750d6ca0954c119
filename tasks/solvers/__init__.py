"""Solvers: from a layer's weight and the statistics of its input to integers, scales and zero points.

Pure functions, one layer at a time; none of them runs the model. All rest on one fact: for a linear layer with inputs
X, a change D of its weight costs ||X D^T||^2 = trace(D H D^T), with H = X^T X the Gram matrix of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PART = 1 << 21  # numbers of a weight that are worked on together: what is made of them stays in a processor's cache
Span = tuple[Tensor, Tensor]  # the smallest and the largest number of each group, float32 [rows, groups]


@dataclass(frozen=True)
class Grid:
    """The numbers that a weight is rounded to: (integer - zero) * scale, with a scale for each `group_size` inputs of
    each row (None: one for the row). symmetric: the zero lies in the middle. dtype: what scales are stored in.
    least_zero: where a format has no place for smaller zeros."""

    bits: int
    group_size: int | None
    symmetric: bool
    dtype: torch.dtype
    least_zero: int = 0

    @property
    def top(self) -> int:
        """The largest integer; the smallest is 0."""
        return int(2**self.bits - 1)

    def groups(self, width: int) -> int:
        """How many groups a row of `width` inputs has."""
        return width // (self.group_size or width)

    def fitted(self, width: int) -> Grid:
        """This grid with the largest groups, halved as often as need be, that divide a row of `width` inputs."""
        size = self.group_size
        while size and width % size:
            size //= 2
        return replace(self, group_size=size)

    def bits_per_weight(self, width: int) -> float:
        """What a weight takes on disk, its share of scales and zeros counted."""
        group = (torch.finfo(self.dtype).bits + (0 if self.symmetric else self.bits)) * self.groups(width)
        return self.bits + group / width


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid. integers: uint8 [rows, width], scales: [rows, groups] in the grid's dtype, zeros: uint8
    [rows, groups]."""

    integers: Tensor
    scales: Tensor
    zeros: Tensor

    def weight(self) -> Tensor:
        """The weight that they stand for, float32 [rows, width]."""
        rows, width = self.integers.shape
        grouped = self.integers.view(rows, self.scales.shape[1], -1).float()
        return ((grouped - self.zeros[..., None]) * self.scales[..., None].float()).view(rows, width)


def whole_span(weight: Tensor, grid: Grid) -> Span:
    """The ends of each group of `weight` [rows, width], with zero, which must be on the grid, between them."""
    grouped = weight.float().view(len(weight), grid.groups(weight.shape[1]), -1)
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def fit_grid(weight: Tensor, grid: Grid, span: Span | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zeros that span each group of `weight` [rows, width]: [rows, groups] in the grid's dtype, and uint8.

    span: to be no wider than this; what is beyond will be clipped.
    """
    low, high = whole_span(weight, grid)
    if span:
        low, high = low.maximum(span[0]), high.minimum(span[1])
    scale = 2 * torch.maximum(-low, high) / grid.top if grid.symmetric else (high - low) / grid.top
    # rounded as it is stored, so that all that follows computes with what will be loaded
    scale = scale.clamp(min=torch.finfo(grid.dtype).tiny).to(grid.dtype)
    if grid.symmetric:
        return scale, torch.full_like(scale, 2 ** (grid.bits - 1), dtype=torch.uint8)
    return scale, (-low / scale.float()).round().clamp(grid.least_zero, grid.top).to(torch.uint8)


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Rounded:
    """Every weight of [rows, width] to the nearest number of its group's grid."""
    grouped = weight.float().view(len(weight), scales.shape[1], -1)
    integers = (grouped / scales[..., None].float()).round_().add_(zeros[..., None]).clamp_(0, grid.top)
    return Rounded(integers.to(torch.uint8).view(weight.shape), scales, zeros)


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
