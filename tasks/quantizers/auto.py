"""Mixed precision: each linear layer gets the bits and groups with which the model keeps the most for its size.

First the cost of every precision in every layer is measured (sensitivity.py), then one chosen for each, so that the
costs add up to the least in the size that is allowed, or the size is the least for what may be lost
(tasks/solvers/allocate.py). Then AWQ's scaling and clipping, GPTQ's rounding and its refinement on the chosen grids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from tasks.errors import TaskError
from tasks.grid import Grid
from tasks.model.linears import linear_shapes
from tasks.model.precisions import write_precisions
from tasks.quantizers import QuantizeJob
from tasks.quantizers.grouped import FORMS, press_grouped
from tasks.quantizers.sensitivity import STATE, TRIAL, Sensitivity, measure
from tasks.settings import AutoSettings
from tasks.solvers.allocate import Cost, least_error, least_size

# scales of float16 have three more bits than those of bfloat16, which costs a tenth less of the perplexity lost
FORM = replace(FORMS["compressed-tensors"], dtype=torch.float16)


def press(job: QuantizeJob) -> None:
    """Measure every layer at every candidate, choose, and press. TaskError if no choice keeps what is asked for."""
    variant = job.variant
    assert isinstance(variant, AutoSettings)  # the method named this module
    # 8 bits need no zero points
    grids = {f"{bits}@{size}": FORM.grid(bits, size, bits == 8, job.dtype) for bits, size in variant.pairs}
    found = measure(job, grids)
    chosen = choose(linear_shapes(job.source), found, grids, variant)
    write_precisions(job.destination, chosen, {name: one.costs() for name, one in found.items()})
    how = replace(TRIAL, scale=True, clip=True, refine=variant.refine, propagate=variant.propagate)
    press_grouped(job, FORM, {name: grids[label] for name, label in chosen.items()}, how, [])
    (job.destination / STATE).unlink()


def choose(
    shapes: Mapping[str, tuple[int, int]],
    found: Mapping[str, Sensitivity],
    grids: Mapping[str, Grid],
    variant: AutoSettings,
) -> dict[str, str]:
    """The candidate for each linear layer. shapes: (rows, width) by its name. TaskError if none fits the budget."""
    units: dict[str, list[str]] = {}
    for name in found:
        units.setdefault(_fused(name) if variant.fused else name, []).append(name)
    costs = {name: one.costs() for name, one in found.items()}
    table = {
        unit: {
            label: Cost(
                error=sum(costs[name][label] for name in names),
                bits=sum(math.prod(shapes[name]) * grids[label].bits_per_weight(shapes[name][1]) for name in names),
            )
            for label in costs[names[0]]
        }
        for unit, names in units.items()
    }
    if variant.bits_per_weight is not None:
        chosen = least_error(table, variant.bits_per_weight * sum(math.prod(shape) for shape in shapes.values()))
    else:
        assert variant.retention is not None  # one of the two is given
        best = math.exp(-sum(min(cost.error for cost in costs.values()) for costs in table.values()))
        if best < variant.retention:
            raise TaskError(
                f"retention is {variant.retention:g}, but the best of the candidates are expected to keep {best:.4f}; "
                "lower it, or add candidates with more bits or smaller groups"
            )
        chosen = least_size(table, -math.log(variant.retention))
    return {name: chosen[unit] for unit, names in units.items() for name in names}


def _fused(name: str) -> str:
    """The same for layers that an engine such as vLLM makes one of."""
    for part, whole in {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}.items():
        if name.endswith(part):
            return name.removesuffix(part) + whole
    return name
