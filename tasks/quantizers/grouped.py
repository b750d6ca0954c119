"""What our methods for weights in groups share: solve each linear layer on its grid, write it in the form asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tasks.formats.autogptq import autogptq_config, pack_autogptq
from tasks.formats.awq_gemm import gemm_config, pack_gemm
from tasks.formats.compressed import pack_words, words_config
from tasks.grid import ClipRange, Grid, QuantizedWeight
from tasks.model.family import UNCLIPPED
from tasks.model.linears import linear_shapes
from tasks.quantizers import QuantizeJob
from tasks.quantizers.layerwise import Layer, left_alone, press_layers
from tasks.quantizers.propagation import PropagatedActivations
from tasks.solvers import gptq, rtn
from tasks.solvers.awq import search_clip, search_scale
from tasks.solvers.refine import refine


@dataclass(frozen=True)
class Form:
    """A format on disk. dtype: of scales and of what is not quantized (None: the model's own); least_zero: as in Grid;
    pack, config: as in tasks/formats, config from the grids, the way of rounding and the decoder layers left alone."""

    pack: Callable[[QuantizedWeight, Grid], dict[str, Tensor]]
    config: Callable[[Mapping[str, Grid], Rounding, list[int]], dict[str, Any]]
    dtype: torch.dtype | None = None
    least_zero: int = 0

    def grid(self, bits: int, group_size: int, symmetric: bool, own: torch.dtype) -> Grid:
        """A grid that this format can hold; `own`: the model's dtype."""
        return Grid(bits, group_size, symmetric, self.dtype or own, self.least_zero)


@dataclass(frozen=True)
class Rounding:
    """How a weight gets onto its grid. scale: channels by AWQ's search first; clip: AWQ's search for the groups'
    limits; gptq: by GPTQ, else to the nearest; act_order: of GPTQ; damping: `Layer.damp`; refine: rounds of it,
    afterwards; propagate: from what a layer reads once those before it are pressed."""

    scale: bool
    clip: bool
    gptq: bool
    act_order: bool
    damping: float
    refine: int
    propagate: bool


def _words_config(grids: Mapping[str, Grid], how: Rounding, skip: list[int]) -> dict[str, Any]:
    return words_config(grids, how.gptq and how.act_order, left_alone(skip))


def _pack_gemm(solved: QuantizedWeight, _: Grid) -> dict[str, Tensor]:
    return pack_gemm(solved)


def _pack_autogptq(solved: QuantizedWeight, grid: Grid) -> dict[str, Tensor]:
    return pack_autogptq(solved, grid.bits)


def _gemm_config(grids: Mapping[str, Grid], _: Rounding, skip: list[int]) -> dict[str, Any]:
    return gemm_config(_one(grids), skip)


def _autogptq_config(grids: Mapping[str, Grid], how: Rounding, _: list[int]) -> dict[str, Any]:
    return autogptq_config(_one(grids), how.act_order, how.damping)


def _one(grids: Mapping[str, Grid]) -> Grid:
    """The grid of a format that knows only one (tasks/model/compatibility.py sees to it)."""
    (grid,) = set(grids.values())
    return grid


# by their names in params.yaml
FORMS = {
    "compressed-tensors": Form(pack_words, _words_config),
    "awq": Form(_pack_gemm, _gemm_config, torch.float16),
    "gptq": Form(_pack_autogptq, _autogptq_config, torch.float16, least_zero=1),
}


def uniform(job: QuantizeJob, grid: Grid, skip: list[int]) -> dict[str, Grid]:
    """One grid for every linear layer outside the decoder layers in `skip`, in smaller groups where they must be."""
    inside = tuple(f".layers.{index}." for index in skip)
    shapes = linear_shapes(job.source)
    return {name: grid.fitted(width) for name, (_, width) in shapes.items() if not any(part in name for part in inside)}


def press_grouped(job: QuantizeJob, form: Form, grids: Mapping[str, Grid], how: Rounding, skip: list[int]) -> None:
    """Solve every layer on the statistics of its inputs, and write the model. grids: by linear layer."""
    dtype = form.dtype or job.dtype
    stream = PropagatedActivations(job) if how.propagate else None

    def press(layer: Layer) -> dict[str, dict[str, Tensor]]:
        if stream:
            layer.inputs = stream.inputs(layer.index)
        own = {linear: grids[layer.prefix + linear] for linear in layer.inputs}
        layer.damp(how.damping)
        if how.scale:
            scale_channels(layer, own, dtype)
        solved = solve_layer(layer, own, how)
        if stream:
            stream.advance(
                layer.index, layer.tensors | {f"{name}.weight": part.weight() for name, part in solved.items()}
            )
        return {linear: form.pack(part, own[linear]) for linear, part in solved.items()}

    again = None if stream else partial(press_grouped, form=form, grids=grids, how=how, skip=skip)
    press_layers(job, press, form.config(grids, how, skip), dtype, skip, again)
    if stream:
        stream.close()


def scale_channels(layer: Layer, grids: Mapping[str, Grid], dtype: torch.dtype) -> None:
    """AWQ's factors for each input that something can take over a factor for, found on the coarsest of the grids that
    read it."""
    for source, linears in layer.scalable():
        known = layer.inputs[linears[0]]
        grid = min((grids[name] for name in linears), key=lambda grid: grid.bits_per_weight(len(known.mean)))
        factor = search_scale(layer.stacked(linears), known.gram, known.mean, grid)
        layer.scale_input(source, linears, factor, dtype)


def solve_layer(layer: Layer, grids: Mapping[str, Grid], how: Rounding) -> dict[str, QuantizedWeight]:
    """The solution of each layer in `grids`; those that read the same input and share a grid are solved as one."""
    found: dict[str, QuantizedWeight] = {}
    for readers, known in layer.readers():
        for grid in dict.fromkeys(grids[name] for name in readers if name in grids):
            linears = [name for name in readers if grids.get(name) == grid]
            weight = layer.stacked(linears)
            clip_range = _clip_range(layer, linears, weight, known.gram, grid) if how.clip else None
            if how.gptq:
                solved = gptq.solve(weight, known.gram, grid, act_order=how.act_order, clip_range=clip_range)
            else:
                solved = rtn.solve(weight, grid, clip_range)
            found |= layer.split(refine(weight, known.gram, grid, solved, how.refine), linears)
    return found


def _clip_range(layer: Layer, linears: list[str], weight: Tensor, gram: Tensor, grid: Grid) -> ClipRange:
    low, high = search_clip(weight, gram, grid)
    free = torch.cat([torch.full((len(layer.weight(name)), 1), name in UNCLIPPED) for name in linears]).to(low.device)
    return low.masked_fill(free, -torch.inf), high.masked_fill(free, torch.inf)
