"""GPTQ (arXiv 2210.17323): round column by column, compensating each rounding error in the later columns.

All rows of all layers with the same input share its Gram matrix: stack them and solve once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.grid import ClipRange, Grid, QuantizedWeight
from tasks.solvers import one_thread

BLOCK = 64  # columns whose errors are propagated together; no effect on the result beyond rounding


def solve(
    weight: Tensor,
    gram: Tensor,
    grid: Grid,
    *,
    act_order: bool,
    damping: float = 0.0,
    clip_range: ClipRange | None = None,
) -> QuantizedWeight:
    """Round `weight` [rows, width], whose inputs have the Gram matrix `gram` [width, width].

    act_order: the columns with the largest activations first, on the grid of the original weight ("static").
    damping: share of the Gram matrix's mean diagonal added to its diagonal. clip_range: see `Grid.fit`.
    """
    scales, zeros = grid.fit(weight, clip_range)
    width = weight.shape[1]
    diagonal = gram.diagonal()
    dead = diagonal == 0
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(width, device=gram.device)
    group = order // (grid.group_size or width)
    rest = weight.float().masked_fill(dead, 0)[:, order].T.contiguous()  # [width, rows]: columns are contiguous
    factor = _inverse_factor(gram, dead, damping, order)
    scale, zero = scales.float().T.contiguous()[group], zeros.float().T.contiguous()[group]
    integers = torch.empty_like(rest)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        block, local = rest[start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            column, s, z = block[i], scale[start + i], zero[start + i]
            rounded = grid.nearest(column, s, z)
            integers[start + i] = rounded
            errors[i] = (column - (rounded - z).mul_(s)).div_(local[i, i])
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        rest[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(width, device=order.device)
    return QuantizedWeight(integers[back].T.contiguous().to(torch.uint8), scales, zeros)


def _inverse_factor(gram: Tensor, dead: Tensor, damping: float, order: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix, permuted by `order`."""
    matrix = gram.clone()
    matrix.diagonal().masked_fill_(dead, 1)
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    matrix = matrix[order][:, order]
    with one_thread():
        factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
    return factor
