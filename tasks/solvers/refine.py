"""A solution made better in place: its scales by least squares, its integers by coordinate descent (QuantEase, arXiv
2309.01885).

GPTQ takes the scales as given and rounds each weight once; both can be looked at again when all others are known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.grid import Grid, QuantizedWeight
from tasks.solvers import one_thread, output_error, row_parts

BLOCK = 64  # columns whose changes reach the rest together; changes no result beyond rounding
CHUNK = 1 << 24  # numbers of the least squares' matrices in memory at once
DAMPING = 1e-4  # of the least squares, towards the scales as they are: share of the mean diagonal


def refine(weight: Tensor, gram: Tensor, grid: Grid, solved: QuantizedWeight, rounds: int) -> QuantizedWeight:
    """`solved`, or what is better: no row's error grows.

    weight: [rows, width] as it should be; gram: [width, width] of its inputs. A round is both steps.
    """
    if not rounds:
        return solved
    weight = weight.float()
    error = output_error(solved.weight() - weight, gram)
    for _ in range(rounds):
        fitted = QuantizedWeight(solved.integers, _fit_scales(weight, gram, solved), solved.zeros)
        solved, error = _better(weight, gram, solved, error, fitted)
        solved, error = _better(weight, gram, solved, error, _descend(weight, gram, grid, solved))
    return solved


def _better(
    weight: Tensor, gram: Tensor, old: QuantizedWeight, error: Tensor, new: QuantizedWeight
) -> tuple[QuantizedWeight, Tensor]:
    """Of each row the one with the smaller error, [rows] that of `old`; and its error."""
    found = output_error(new.weight() - weight, gram)
    keep = found < error
    rows = keep[:, None]
    integers, scales = torch.where(rows, new.integers, old.integers), torch.where(rows, new.scales, old.scales)
    return QuantizedWeight(integers, scales, old.zeros), torch.where(keep, found, error)


def _fit_scales(weight: Tensor, gram: Tensor, solved: QuantizedWeight) -> Tensor:
    """The scales with the least error for these integers, [rows, groups] in the dtype of the old ones.

    A row's weight is linear in its scales: sum over the groups g of s_g q_g, with q the integers less their zeros. The
    normal equations are sum over h of (q_g H q_h) s_h = q_g H w.
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
    # a group whose integers say nothing keeps its scale
    return torch.where(fitted > 0, fitted, solved.scales)


def _descend(weight: Tensor, gram: Tensor, grid: Grid, solved: QuantizedWeight) -> QuantizedWeight:
    """Column by column, the integer that is best while all others stay as they are."""
    size = weight.shape[1] // solved.scales.shape[1]
    # a column is a row in memory
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
        # the block's own slope is up to date
        step = change[start:end] - before
        slope[end:].addmm_(gram[end:, start:end], step)
    return QuantizedWeight(integers.T.contiguous().to(torch.uint8), solved.scales, solved.zeros)
