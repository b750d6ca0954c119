"""The scheme mixed: each linear layer gets the precision with which the model keeps the most for its size.

First the cost of every candidate in every layer is measured (sensitivity.py), then one is chosen for each, so that the
costs add up to the least in the size that is allowed, or the size is the least for what may be lost
(tasks/solvers/allocate.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tasks.errors import TaskError
from tasks.grid import Precision
from tasks.model.family import FUSED
from tasks.model.layout import bits_per_weight, candidate_precisions, quantized_shapes
from tasks.model.precisions import write_precisions
from tasks.quantizers import QuantizeJob
from tasks.quantizers.sensitivity import Sensitivity, measure
from tasks.settings.variant import VariantSettings
from tasks.solvers.allocate import Cost, least_error, least_size


def choose_precisions(job: QuantizeJob) -> dict[str, Precision]:
    """Of each linear layer that does not stay as it is, by its whole name; the choice and what it rests on are recorded
    in the destination. TaskError if no choice keeps what is asked for."""
    candidates = candidate_precisions(job.variant, job.source)
    shapes = quantized_shapes(job.variant, job.source)
    found = {name: one for name, one in measure(job, candidates).items() if name in shapes}
    chosen = choose(shapes, found, candidates, job.variant, job.dtype)
    write_precisions(job.destination, chosen, {name: one.costs() for name, one in found.items()})
    return {name: precision for name, label in chosen.items() if (precision := candidates[label])}


def choose(
    shapes: Mapping[str, tuple[int, int]],
    found: Mapping[str, Sensitivity],
    candidates: Mapping[str, Precision | None],
    variant: VariantSettings,
    dtype: torch.dtype,
) -> dict[str, str]:
    """The candidate for each linear layer, by its label.

    shapes: (rows, width) by the layer's name. dtype: of a layer that stays as it is. TaskError if none fits the budget.
    """

    def size(name: str, label: str) -> float:
        return math.prod(shapes[name]) * bits_per_weight(candidates[label], shapes[name][1], dtype)

    units: dict[str, list[str]] = {}
    for name in found:
        units.setdefault(_fused(name) if variant.fused else name, []).append(name)
    costs = {name: one.costs() for name, one in found.items()}
    table = {
        unit: {
            label: Cost(
                error=sum(costs[name][label] for name in names),
                bits=sum(
                    math.prod(shapes[name]) * bits_per_weight(candidates[label], shapes[name][1], dtype)
                    for name in names
                ),
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
    stem, _, linear = name.rpartition(".")
    return f"{stem}.{FUSED.get(linear, linear)}"
