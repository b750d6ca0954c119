"""Quantization grids, and weights rounded to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ClipRange = tuple[Tensor, Tensor]  # minimum and maximum of each group, float32 [rows, groups]


@dataclass(frozen=True)
class Grid:
    """The values that a weight is rounded to: (integer - zero) * scale, with one scale for each `group_size` inputs
    of a row (None: one for the row). symmetric: the zero point is the middle of the integers. dtype: of stored scales.
    least_zero: the smallest zero point that the format can store."""

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
        """The zero point of a symmetric grid."""
        return int(2 ** (self.bits - 1))

    def groups(self, width: int) -> int:
        """The number of groups in a row of `width` inputs."""
        return width // (self.group_size or width)

    def fitted(self, width: int) -> Grid:
        """This grid with its group size halved until it divides `width`."""
        size = self.group_size
        while size and width % size:
            size //= 2
        return replace(self, group_size=size)

    def bits_per_weight(self, width: int) -> float:
        """Bits per weight on disk, including scales and zero points."""
        group = (torch.finfo(self.dtype).bits + (0 if self.symmetric else self.bits)) * self.groups(width)
        return self.bits + group / width

    def full_range(self, weight: Tensor) -> ClipRange:
        """The range of each group of `weight` [rows, width], extended to include 0, which must be on the grid."""
        grouped = weight.float().view(len(weight), self.groups(weight.shape[1]), -1)
        return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)

    def fit(self, weight: Tensor, clip_range: ClipRange | None = None) -> tuple[Tensor, Tensor]:
        """Scales and zero points that cover each group of `weight` [rows, width]: [rows, groups] in `dtype`, uint8.

        clip_range: limits of the range; weights beyond are clipped.
        """
        low, high = self.full_range(weight)
        if clip_range:
            low, high = low.maximum(clip_range[0]), high.minimum(clip_range[1])
        scale = 2 * torch.maximum(-low, high) / self.top if self.symmetric else (high - low) / self.top
        # round to the stored dtype, so that solvers see the scale that will be loaded
        scale = scale.clamp(min=torch.finfo(self.dtype).tiny).to(self.dtype)
        if self.symmetric:
            return scale, torch.full_like(scale, self.middle, dtype=torch.uint8)
        return scale, (-low / scale.float()).round().clamp(self.least_zero, self.top).to(torch.uint8)

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The integers, as floats, of the grid values nearest to `values`; all float32, shapes broadcast."""
        return (values / scale).round_().add_(zero).clamp_(0, self.top)

    def round_with(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> QuantizedWeight:
        """Round every weight [rows, width] to the nearest value of its group's grid."""
        grouped = weight.float().view(len(weight), scales.shape[1], -1)
        integers = self.nearest(grouped, scales[..., None].float(), zeros[..., None])
        return QuantizedWeight(integers.to(torch.uint8).view(weight.shape), scales, zeros)

    def round(self, weight: Tensor, clip_range: ClipRange | None = None) -> QuantizedWeight:
        """Round `weight` [rows, width] to the nearest value of a grid that covers each group; clip_range: see `fit`."""
        return self.round_with(weight, *self.fit(weight, clip_range))


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight. integers: uint8 [rows, width]; scales: [rows, groups] in the grid's dtype; zeros: uint8
    [rows, groups]."""

    integers: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def group_size(self) -> int:
        """The number of weights in a row that share a scale."""
        return self.integers.shape[1] // self.scales.shape[1]

    def weight(self) -> Tensor:
        """The dequantized weight, float32 [rows, width]."""
        rows, width = self.integers.shape
        grouped = self.integers.view(rows, self.scales.shape[1], -1).float()
        return ((grouped - self.zeros[..., None]) * self.scales[..., None].float()).view(rows, width)

    def rows(self, part: slice) -> QuantizedWeight:
        """A slice of the rows."""
        return QuantizedWeight(self.integers[part], self.scales[part], self.zeros[part])


@dataclass(frozen=True)
class Precision:
    """The precision of a linear layer: the grid of its weight, and the per-token 8-bit rounding of its input.

    symmetric_activations: whether that rounding is symmetric; None: the input is not quantized.
    """

    grid: Grid
    symmetric_activations: bool | None = None
