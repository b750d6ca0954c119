"""The numbers that a weight may take, and a weight on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ClipRange = tuple[Tensor, Tensor]  # the smallest and the largest number of each group, float32 [rows, groups]


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

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return int(2 ** (self.bits - 1))

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
        """Bits that a weight takes on disk, its share of scales and zeros counted."""
        group = (torch.finfo(self.dtype).bits + (0 if self.symmetric else self.bits)) * self.groups(width)
        return self.bits + group / width

    def full_range(self, weight: Tensor) -> ClipRange:
        """The ends of each group of `weight` [rows, width], with zero, which must be on the grid, between them."""
        grouped = weight.float().view(len(weight), self.groups(weight.shape[1]), -1)
        return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)

    def fit(self, weight: Tensor, clip_range: ClipRange | None = None) -> tuple[Tensor, Tensor]:
        """Scales and zeros that cover each group of `weight` [rows, width]: [rows, groups] in `dtype`, and uint8.

        clip_range: to be no wider than this; what is beyond will be clipped.
        """
        low, high = self.full_range(weight)
        if clip_range:
            low, high = low.maximum(clip_range[0]), high.minimum(clip_range[1])
        scale = 2 * torch.maximum(-low, high) / self.top if self.symmetric else (high - low) / self.top
        # rounded as it is stored, so that all that follows computes with what will be loaded
        scale = scale.clamp(min=torch.finfo(self.dtype).tiny).to(self.dtype)
        if self.symmetric:
            return scale, torch.full_like(scale, self.middle, dtype=torch.uint8)
        return scale, (-low / scale.float()).round().clamp(self.least_zero, self.top).to(torch.uint8)

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The integers, as floats, of the numbers nearest to `values`; float32 all, shapes that broadcast."""
        return (values / scale).round_().add_(zero).clamp_(0, self.top)

    def round_with(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> QuantizedWeight:
        """Every weight of [rows, width] to the nearest number of its group's grid."""
        grouped = weight.float().view(len(weight), scales.shape[1], -1)
        integers = self.nearest(grouped, scales[..., None].float(), zeros[..., None])
        return QuantizedWeight(integers.to(torch.uint8).view(weight.shape), scales, zeros)

    def round(self, weight: Tensor, clip_range: ClipRange | None = None) -> QuantizedWeight:
        """`weight` [rows, width] to the nearest of the grid that covers each of its groups; clip_range: as in `fit`."""
        return self.round_with(weight, *self.fit(weight, clip_range))


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid. integers: uint8 [rows, width], scales: [rows, groups] in the grid's dtype, zeros: uint8
    [rows, groups]."""

    integers: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def group_size(self) -> int:
        """How many weights of a row share a scale."""
        return self.integers.shape[1] // self.scales.shape[1]

    def weight(self) -> Tensor:
        """The weight that they stand for, float32 [rows, width]."""
        rows, width = self.integers.shape
        grouped = self.integers.view(rows, self.scales.shape[1], -1).float()
        return ((grouped - self.zeros[..., None]) * self.scales[..., None].float()).view(rows, width)

    def rows(self, part: slice) -> QuantizedWeight:
        """Some of its rows."""
        return QuantizedWeight(self.integers[part], self.scales[part], self.zeros[part])


@dataclass(frozen=True)
class Precision:
    """Of a linear layer: the grid of its weight, and how its input is rounded to 8 bits, token by token.

    symmetric_activations: of that rounding; None: the input stays as it is.
    """

    grid: Grid
    symmetric_activations: bool | None = None
