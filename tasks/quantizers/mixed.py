"""The scheme mixed: a precision for each linear layer.

Measures the cost of every candidate in every layer (sensitivity.py), then chooses one for each, minimizing the total
cost within the allowed size, or the size within the allowed loss (tasks/solvers/allocate.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tasks.errors import TaskError
from tasks.grid import Precision
from tasks.model.layout import bits_per_weight, candidate_precisions, quantized_shapes
from tasks.model.precisions import read_precisions, write_precisions
from tasks.model.structure import LayerStructure, read_structure
from tasks.quantizers import QuantizeJob
from tasks.quantizers.sensitivity import Sensitivity, measure
from tasks.settings.variant import VariantSettings
from tasks.solvers.allocate import Cost, least_error, least_size


def choose_precisions(job: QuantizeJob) -> dict[str, Precision]:
    """Choose the precision of each linear layer to quantize, by full name; record costs and choice in the destination.
    TaskError if no choice meets the budget."""
    candidates = candidate_precisions(job.variant, job.source)
    shapes = quantized_shapes(job.variant, job.source, job.statistics)
    found = {name: one for name, one in measure(job, candidates).items() if name in shapes}
    units = _units(read_structure(job.statistics), bool(job.variant.fused))
    chosen = choose(shapes, found, candidates, job.variant, job.dtype, units)
    write_precisions(job.destination, chosen, {name: one.costs() for name, one in found.items()})
    return {name: precision for name, label in chosen.items() if (precision := candidates[label])}


def chosen_precisions(job: QuantizeJob) -> dict[str, Precision]:
    """What `choose_precisions` has recorded in the destination."""
    candidates = candidate_precisions(job.variant, job.source)
    chosen = {one["name"]: candidates[one["chosen"]] for one in read_precisions(job.destination)}
    return {name: precision for name, precision in chosen.items() if precision}


def choose(
    shapes: Mapping[str, tuple[int, int]],
    found: Mapping[str, Sensitivity],
    candidates: Mapping[str, Precision | None],
    variant: VariantSettings,
    dtype: torch.dtype,
    unit: Mapping[str, str],
) -> dict[str, str]:
    """Choose the label of a candidate for each linear layer.

    shapes: (rows, width) by layer name. dtype: of unquantized layers. unit: by layer name, a name shared by layers that
    must have the same. TaskError if no choice fits the budget.
    """

    def size(name: str, label: str) -> float:
        return math.prod(shapes[name]) * bits_per_weight(candidates[label], shapes[name][1], dtype)

    units: dict[str, list[str]] = {}
    for name in found:
        units.setdefault(unit[name], []).append(name)
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
        assert variant.retention is not None  # the settings have exactly one budget
        best = math.exp(-sum(min(cost.error for cost in costs.values()) for costs in table.values()))
        if best < variant.retention:
            raise TaskError(
                f"retention is {variant.retention:g}, but the best of the candidates are expected to keep {best:.4f}; "
                "lower it, or add candidates with more bits or smaller groups"
            )
        chosen = least_size(table, -math.log(variant.retention))
    return {name: chosen[unit] for unit, names in units.items() for name in names}


def _units(layers: list[LayerStructure], fused: bool) -> dict[str, str]:
    """By linear layer, the name of its unit. The experts of a layer share one precision, as engines ask for; if
    `fused`, so do layers with the same input, which engines such as vLLM join."""
    found = {}
    for layer in layers:
        for group in layer.groups:
            for name in group:
                own = group[0] if fused else name
                found[layer.prefix + name] = layer.prefix + ("experts" if group[0] in layer.experts else own)
    return found
