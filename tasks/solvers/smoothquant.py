"""SmoothQuant (arXiv 2211.10438): move outliers from the activations into the weights before rounding both.

The paper balances the largest magnitudes of both; the rounding errors depend on other quantities. Let s be the factors,
w the norms of the weight's columns, x the sizes of the input channels. A token's step size grows with its x / s, and
its error reaches the outputs through the sum of (s w)^2; a row's step size grows with its s w, and its error reaches
the outputs through the sum of (x / s)^2. So both errors grow with the product of the two sums, which is minimal where
x / s is proportional to s w (Cauchy-Schwarz): s^2 = x / w.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smooth(weight: Tensor, gram: Tensor, largest: Tensor, strength: float) -> Tensor:
    """The factor for each input channel, float32 [width]: multiply the weight by it, divide the input by it.

    weight: [rows, width]; gram, largest: of its inputs (tasks/statistics.py). strength: 0 equalizes the weight's
    columns, 1 the input channels; 0.5 minimizes the product. A channel's size is the geometric mean of its root mean
    square, typical of most tokens, and its largest magnitude, which sets the step size of the others.
    """
    size = (gram.diagonal().clamp(min=0).sqrt() * largest).sqrt()
    scale = _normalized(size).pow(strength) / _normalized(weight.norm(dim=0)).pow(1 - strength)
    return scale / scale.log().mean().exp()


def _normalized(sizes: Tensor) -> Tensor:
    """Divide by the mean, with a lower bound, so that dead channels cause no unbounded factor."""
    return (sizes / sizes.mean().clamp(min=torch.finfo(sizes.dtype).tiny)).clamp(min=1e-5)
