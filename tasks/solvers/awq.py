"""AWQ (arXiv 2306.00978): scale up the channels that matter before rounding, and cut off the outliers of each group.

Both searches are grids of trials, as in AutoAWQ, and the cost of a trial comes from the Gram matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.solvers import Grid, output_error
from tasks.solvers.rtn import solve as round_to_nearest

SCALE_TRIALS = 20
ROWS = 512  # at most as many, but more than half, tell the trials apart as well as all do, in a fraction of the time
CLIP_TRIALS = 10
CLIP_STEP = 0.05  # of the largest magnitude


def search_scale(weight: Tensor, gram: Tensor, mean: Tensor, grid: Grid) -> Tensor:
    """The factor for each input channel, float32 [width], with which rounding costs the least of the layer's output.

    weight: [rows, width], to be multiplied by the factors; its input is to be divided. mean: of the inputs' magnitudes.
    Of more than `ROWS` rows every second, third or nth is tried.
    """
    importance = _importance(weight, grid)
    weight = weight[:: -(-len(weight) // ROWS)]
    best, least = torch.ones_like(mean), torch.inf
    for trial in range(SCALE_TRIALS):
        ratio = trial / SCALE_TRIALS
        scale = (mean.pow(ratio) / (importance.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale /= (scale.max() * scale.min()).sqrt()
        change = round_to_nearest(weight * scale, grid).weight().div_(scale).sub_(weight)
        error = output_error(change, gram).sum().item()
        if error < least:
            best, least = scale, error
    return best


def _importance(weight: Tensor, grid: Grid) -> Tensor:
    """The mean over the rows of each weight's magnitude in its group, as a share of the group's largest: [width]."""
    grouped = weight.abs().view(len(weight), grid.groups(weight.shape[1]), -1)
    return (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).view(weight.shape).mean(0)


def search_clip(weight: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """The largest magnitude to span in each group, float32 [rows, groups], with the least error of its output."""
    groups = grid.groups(weight.shape[1])
    grouped = weight.view(len(weight), groups, -1)
    size = grouped.shape[-1]
    # the blocks on the diagonal: what a group's inputs have to do with those of other groups is left out
    own = gram.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    largest = grouped.abs().amax(-1)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for trial in range(CLIP_TRIALS):
        limit = largest * (1 - CLIP_STEP * trial)
        change = round_to_nearest(weight, grid, limit).weight().sub_(weight).view(grouped.shape).transpose(0, 1)
        error = (torch.bmm(change, own) * change).sum(-1).T
        best = torch.where(error < least, limit, best)
        least = torch.minimum(error, least)
    return best
