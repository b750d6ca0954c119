"""SmoothQuant (arXiv 2211.10438): outliers of the activations move into the weights before both are rounded.

The paper balances the largest magnitudes of the two. The errors that rounding makes grow with other figures. Be s the
factors, w the norms of the weight's columns, x the sizes of the inputs' channels. A token's step grows with its x / s,
and its error reaches the outputs through the sum of (s w)^2; a row's step grows with its s w, and its error reaches the
outputs through the sum of (x / s)^2. So both errors go with the product of the two sums, which is least where x / s is
as s w (Cauchy and Schwarz): s^2 = x / w.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smooth(weight: Tensor, gram: Tensor, largest: Tensor, strength: float) -> Tensor:
    """The factor for each input channel, float32 [width]: the weight is to be multiplied by it, its input divided.

    weight: [rows, width]; gram, largest: of its inputs (tasks/statistics.py). strength: 0 makes the weight's columns
    equal and 1 the inputs' channels; 0.5 is best for both. A channel's size lies between its root mean square, which
    most tokens show, and its largest magnitude, which sets the step of the others: their geometric mean is taken.
    """
    size = (gram.diagonal().clamp(min=0).sqrt() * largest).sqrt()
    scale = _even(size).pow(strength) / _even(weight.norm(dim=0)).pow(1 - strength)
    return scale / scale.log().mean().exp()


def _even(sizes: Tensor) -> Tensor:
    """In shares of their mean; channels that say nothing count a little, so that no factor is without bounds."""
    return (sizes / sizes.mean().clamp(min=torch.finfo(sizes.dtype).tiny)).clamp(min=1e-5)
