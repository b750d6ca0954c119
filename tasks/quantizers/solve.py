"""Quantize a decoder layer's weights: scale, clip, round and refine, according to a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.grid import ClipRange, Grid, Precision, QuantizedWeight
from tasks.quantizers.layer import Layer
from tasks.schemes import default_damping
from tasks.settings.variant import VariantSettings
from tasks.solvers import gptq
from tasks.solvers.awq import search_clip, search_scale
from tasks.solvers.refine import refine
from tasks.solvers.smoothquant import smooth

# queries and keys are multiplied with each other: the error of either does not show the harm of clipping (AutoAWQ)
UNCLIPPED = ("q_proj", "k_proj")


@dataclass(frozen=True)
class Recipe:
    """The methods of a variant, by their names in params.yaml.

    damping: None: the default for the bits of the layers that read the input.
    """

    scaling: str = "none"
    smoothing: float | None = None
    clip: bool = False
    rounding: str = "nearest"
    act_order: bool = True
    damping: float | None = None
    refine: int = 0

    @classmethod
    def of(cls, variant: VariantSettings) -> Recipe:
        """The recipe of a variant."""
        return cls(
            scaling=variant.scaling,
            smoothing=variant.smoothing,
            clip=variant.clip,
            rounding=variant.rounding,
            act_order=variant.act_order == "static",
            damping=variant.damping,
            refine=variant.refine,
        )

    def damping_of(self, precisions: list[Precision]) -> float:
        """The damping of the Gram matrix of an input whose readers have `precisions`."""
        if self.damping is not None:
            return self.damping
        return default_damping(min(precision.grid.bits for precision in precisions))


def solve_layer(
    layer: Layer, precisions: Mapping[str, Precision], recipe: Recipe, dtype: torch.dtype
) -> dict[str, QuantizedWeight]:
    """Solve each linear layer in `precisions`, by name suffix; scales `layer` in place.

    dtype: of stored norms. AWQ and GPTQ use damped Gram matrices; SmoothQuant does not need damping, so where it
    scales, only GPTQ damps.
    """
    if recipe.rounding == "gptq" or recipe.scaling == "awq":
        for linears in layer.inputs.groups:
            own = [precisions[name] for name in linears if name in precisions]
            if own and not _smoothed(linears, precisions, recipe):
                layer.damp(linears, recipe.damping_of(own))
    if recipe.scaling != "none":
        scale_channels(layer, precisions, recipe, dtype)
    return round_layer(layer, precisions, recipe)


def scale_channels(layer: Layer, precisions: Mapping[str, Precision], recipe: Recipe, dtype: torch.dtype) -> None:
    """Scale each input whose source can absorb the factors, for the coarsest grid among its readers."""
    for pair in layer.scalable():
        linears = pair.readers
        own = [precisions[name].grid for name in linears if name in precisions]
        if not own:
            continue
        known, weight = layer.inputs[linears[0]], layer.stacked(linears)
        if _smoothed(linears, precisions, recipe):
            assert recipe.smoothing is not None  # checked by the settings
            factor = smooth(weight, known.gram, known.largest, recipe.smoothing)
        else:
            grid = min(own, key=lambda grid: grid.bits_per_weight(len(known.mean)))
            factor = search_scale(weight, known.gram, known.mean, grid)
        layer.scale_input(pair, factor, dtype)


def round_layer(layer: Layer, precisions: Mapping[str, Precision], recipe: Recipe) -> dict[str, QuantizedWeight]:
    """Solve each layer in `precisions`; layers with the same input and grid are solved together."""
    found: dict[str, QuantizedWeight] = {}
    for readers, known in layer.readers():
        smoothed = _smoothed(readers, precisions, recipe)
        for grid in dict.fromkeys(precisions[name].grid for name in readers if name in precisions):
            linears = [name for name in readers if name in precisions and precisions[name].grid == grid]
            weight = layer.stacked(linears)
            clip = _clip_range(layer, linears, weight, known.gram, grid) if recipe.clip else None
            damping = recipe.damping_of([precisions[name] for name in linears]) if smoothed else 0.0
            found |= layer.split(round_weight(weight, known.gram, grid, recipe, clip, damping), linears)
    return found


def round_weight(
    weight: Tensor, gram: Tensor, grid: Grid, recipe: Recipe, clip: ClipRange | None, damping: float
) -> QuantizedWeight:
    """Quantize `weight` [rows, width]; gram: of its inputs, [width, width]; damping: still to be added to it."""
    if recipe.rounding == "gptq":
        solved = gptq.solve(weight, gram, grid, act_order=recipe.act_order, damping=damping, clip_range=clip)
    else:
        solved = grid.round(weight, clip)
    return refine(weight, gram, grid, solved, recipe.refine)


def _smoothed(linears: list[str], precisions: Mapping[str, Precision], recipe: Recipe) -> bool:
    """Whether SmoothQuant scales the input of `linears`: if configured, or if all of them quantize it."""
    own = [precisions[name] for name in linears if name in precisions]
    rounded = bool(own) and all(precision.symmetric_activations is not None for precision in own)
    return recipe.scaling == "smoothquant" or (recipe.smoothing is not None and rounded)


def _clip_range(layer: Layer, linears: list[str], weight: Tensor, gram: Tensor, grid: Grid) -> ClipRange:
    low, high = search_clip(weight, gram, grid)
    whole = [torch.full((len(layer.weight(name)), 1), name.rpartition(".")[2] in UNCLIPPED) for name in linears]
    free = torch.cat(whole).to(low.device)
    return low.masked_fill(free, -torch.inf), high.masked_fill(free, torch.inf)
