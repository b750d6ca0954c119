"""SmoothQuant (arXiv 2211.10438): outliers of the activations move into the weights before both are rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.solvers import Grid

# a scale for each row; integers from -128 to 127 are 0 to 255 here
INT8 = Grid(bits=8, group_size=None, symmetric=True, dtype=torch.float32)


def smooth(weight: Tensor, largest: Tensor, strength: float) -> Tensor:
    """The factor for each input channel, float32 [width]: the weight is to be multiplied by it, its input divided.

    largest: the inputs' largest magnitudes, [width]. strength: 0 leaves the outliers where they are, 1 moves them all.
    """
    scale = largest.clamp(min=1e-5).pow(strength) / weight.abs().amax(0).clamp(min=1e-5).pow(1 - strength)
    return scale.clamp(min=1e-5)
