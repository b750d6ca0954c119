"""AWQ (arXiv 2306.00978): scale up salient channels before rounding, and clip the outliers of each group.

Both are grid searches, as in AutoAWQ, with the error of a trial computed from the Gram matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.grid import ClipRange, Grid
from tasks.solvers import output_error, row_parts

SCALE_TRIALS = 20
ROWS = 512  # a sample of this many rows (at least half) ranks the trials as well as all rows, in a fraction of the time
CLIP_SHARES = (1.0, 0.875, 0.75, 0.625)  # of the largest magnitude
CLIP_STEPS = (0.1, 0.05)  # by which each limit of a group is then moved, up and down


def search_scale(weight: Tensor, gram: Tensor, mean: Tensor, grid: Grid) -> Tensor:
    """The factor for each input channel, float32 [width], that minimizes the layer's output error after rounding.

    weight: [rows, width], to be multiplied by the factors; its input is to be divided. mean: of the inputs' magnitudes.
    Of more than `ROWS` rows, every nth is used.
    """
    importance = _importance(weight, grid)
    weight = weight[:: -(-len(weight) // ROWS)]
    best, least = torch.ones_like(mean), torch.inf
    for trial in range(SCALE_TRIALS):
        ratio = trial / SCALE_TRIALS
        scale = (mean.pow(ratio) / (importance.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale /= (scale.max() * scale.min()).sqrt()
        change = grid.round(weight * scale).weight().div_(scale).sub_(weight)
        error = output_error(change, gram).sum().item()
        if error < least:
            best, least = scale, error
    return best


def _importance(weight: Tensor, grid: Grid) -> Tensor:
    """Each weight's magnitude relative to the largest of its group, averaged over the rows: [width]."""
    grouped = weight.abs().view(len(weight), grid.groups(weight.shape[1]), -1)
    return (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).view(weight.shape).mean(0)


def search_clip(weight: Tensor, gram: Tensor, grid: Grid) -> ClipRange:
    """The clip range of each group that minimizes its output error.

    Tries shares of the largest magnitude, as in the paper, then moves each limit separately by small steps.
    """
    groups = grid.groups(weight.shape[1])
    size = weight.shape[1] // groups
    # the diagonal blocks: correlations between groups are ignored
    own = gram.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    found = [_search_clip(weight[part], own, grid) for part in row_parts(weight)]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


def _search_clip(weight: Tensor, own: Tensor, grid: Grid) -> ClipRange:
    """`search_clip` for some rows. own: Gram matrix of each group's inputs, [groups, size, size]."""
    best = low, high = whole = grid.full_range(weight)
    least = torch.full_like(low, torch.inf)

    def attempt(low: Tensor, high: Tensor) -> None:
        nonlocal best, least
        change = grid.round(weight, (low, high)).weight().sub_(weight)
        change = change.view(-1, *own.shape[:2]).transpose(0, 1)
        error = (torch.bmm(change, own) * change).sum(-1).T
        better = error < least
        best = torch.where(better, low, best[0]), torch.where(better, high, best[1])
        least = torch.minimum(error, least)

    largest = torch.maximum(-low, high)
    for share in CLIP_SHARES:
        attempt(low.maximum(-share * largest), high.minimum(share * largest))
    for step in CLIP_STEPS:
        low, high = best
        for moved in (1 - step, 1 + step):
            attempt(moved * low, high)
        low, high = best
        for moved in (1 - step, 1 + step):
            attempt(low, moved * high)
    return best[0].maximum(whole[0]), best[1].minimum(whole[1])
