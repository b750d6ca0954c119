"""Refine a solution: scales by least squares, integers by coordinate descent (QuantEase, arXiv 2309.01885).

GPTQ takes the scales as given and rounds each weight once; both can be improved once all others are known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.grid import Grid, QuantizedWeight
from tasks.solvers import one_thread, output_error, row_parts

BLOCK = 64  # columns whose changes are propagated together; no effect on the result beyond rounding
CHUNK = 1 << 24  # elements of the least-squares matrices in memory at once
DAMPING = 1e-4  # of the least squares, towards the current scales: share of the mean diagonal


def refine(weight: Tensor, gram: Tensor, grid: Grid, solved: QuantizedWeight, rounds: int) -> QuantizedWeight:
    """Improve `solved`; no row's error increases.

    weight: the original weight, [rows, width]; gram: of its inputs, [width, width]. A round is both steps.
    """
    if not rounds:
        return solved
    weight = weight.float()
    error = output_error(solved.weight() - weight, gram)
    for _ in range(rounds):
        fitted = QuantizedWeight(solved.integers, _fit_scales(weight, gram, solved), solved.zeros)
        solved, error = _best_rows(weight, gram, solved, error, fitted)
        solved, error = _best_rows(weight, gram, solved, error, _descend(weight, gram, grid, solved))
    return solved


def _best_rows(
    weight: Tensor, gram: Tensor, old: QuantizedWeight, error: Tensor, new: QuantizedWeight
) -> tuple[QuantizedWeight, Tensor]:
    """Take for each row the solution with the smaller error; `error`: that of `old`, [rows]. Also return the error."""
    found = output_error(new.weight() - weight, gram)
    keep = found < error
    rows = keep[:, None]
    integers, scales = torch.where(rows, new.integers, old.integers), torch.where(rows, new.scales, old.scales)
    return QuantizedWeight(integers, scales, old.zeros), torch.where(keep, found, error)


def _fit_scales(weight: Tensor, gram: Tensor, solved: QuantizedWeight) -> Tensor:
    """The scales with the least error for these integers, [rows, groups] in the dtype of the old ones.

    A row's weight is linear in its scales: sum over groups g of s_g q_g, with q the integers minus their zero points.
    The normal equations are sum over h of (q_g H q_h) s_h = q_g H w.
    """
    groups = solved.scales.shape[1]
    size = weight.shape[1] // groups
    fitted = solved.scales.float()
    for part in row_parts(weight, CHUNK // groups**2):
        levels = solved.integers[part].view(-1, groups, size).float() - solved.zeros[part][..., None]
        matrix = torch.empty(len(levels), groups, groups, device=weight.device)
        for group in range(groups):
            reach = levels[:, group] @ gram[group * size : (group + 1) * size]
            matrix[:, group] = (reach.view(levels.shape) * levels).sum(-1)
        target = ((weight[part] @ gram).view(levels.shape) * levels).sum(-1)
        damping = DAMPING * matrix.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + torch.finfo(matrix.dtype).tiny
        matrix.diagonal(dim1=1, dim2=2).add_(damping)
        with one_thread():
            fitted[part] = torch.linalg.solve(matrix, target + damping * fitted[part])
    fitted = fitted.to(solved.scales.dtype)
    # a group whose solution is not positive keeps its scale
    return torch.where(fitted > 0, fitted, solved.scales)


def _descend(weight: Tensor, gram: Tensor, grid: Grid, solved: QuantizedWeight) -> QuantizedWeight:
    """Choose the best integer column by column, with all others fixed."""
    size = weight.shape[1] // solved.scales.shape[1]
    # columns contiguous
    target = weight.T.contiguous()
    scale, zero = (v.float().T.contiguous().repeat_interleave(size, 0) for v in (solved.scales, solved.zeros))
    integers = solved.integers.T.float().contiguous()
    change = (integers - zero) * scale - target
    slope = gram @ change
    curve = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
    for start in range(0, len(target), BLOCK):
        end = min(start + BLOCK, len(target))
        before = change[start:end].clone()
        for j in range(start, end):
            best = target[j] + change[j] - slope[j] / curve[j]
            integers[j] = grid.nearest(best, scale[j], zero[j])
            moved = (integers[j] - zero[j]).mul_(scale[j]).sub_(target[j]).sub_(change[j])
            change[j] += moved
            slope[start:end].addr_(gram[start:end, j], moved)
        # the slope within the block is already up to date
        step = change[start:end] - before
        slope[end:].addmm_(gram[end:, start:end], step)
    return QuantizedWeight(integers.T.contiguous().to(torch.uint8), solved.scales, solved.zeros)
