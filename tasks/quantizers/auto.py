"""Mixed precision: each linear layer gets the bits and groups with which the model keeps the most for its size.

First every layer is solved at every precision asked for (GPTQ, arXiv 2210.17323), for the error of its output as a
share of the output, both squared. Then one precision for each, so that the errors add up to the least
(tasks/solvers/allocate.py). Then AWQ's scaling and clipping, GPTQ's rounding and its refinement on the chosen grids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from tqdm import tqdm

from tasks.decoder import TensorFiles
from tasks.fit import linear_shapes
from tasks.output import write_json
from tasks.precisions import write_precisions
from tasks.quantizers import Job
from tasks.quantizers.grouped import FORMS, Rounding, press_grouped, solve_layer
from tasks.quantizers.layerwise import layer_prefixes, read_layer
from tasks.settings import AutoSettings
from tasks.solvers import Grid, output_error
from tasks.solvers.allocate import Cost, least_error

DAMPING = 0.01
TRIAL = Rounding(scale=False, clip=False, gptq=True, act_order=True, damping=DAMPING, refine=0)
MEASURED = "measured.part.json"  # while a run is under way

Errors = dict[str, dict[str, float]]  # by linear layer, by candidate


def press(job: Job) -> None:
    """Measure every layer at every candidate, choose, and press."""
    variant = job.variant
    assert isinstance(variant, AutoSettings)  # the method named this module
    form = FORMS["compressed-tensors"]
    candidates = {
        # 8 bits need no zero points
        f"{bits}@{size}": form.grid(bits, size, bits == 8, job.dtype)
        for bits, size in variant.pairs
    }
    errors = _measure(job, candidates)
    grids = choose(linear_shapes(job.source), errors, candidates, variant.bits_per_weight, variant.fused)
    labels = {grid: label for label, grid in candidates.items()}
    write_precisions(job.destination, {name: labels[grid] for name, grid in grids.items()}, errors)
    how = Rounding(scale=True, clip=True, gptq=True, act_order=True, damping=DAMPING, refine=variant.refine)
    press_grouped(job, form, grids, how, [])
    (job.destination / MEASURED).unlink()


def choose(
    shapes: Mapping[str, tuple[int, int]],
    errors: Mapping[str, Mapping[str, float]],
    candidates: Mapping[str, Grid],
    budget: float,
    fused: bool,
) -> dict[str, Grid]:
    """The grid of each linear layer. shapes: (rows, width) by name. budget: bits a weight over all of them. fused:
    those that read one input share a grid. TaskError if the budget is below the smallest candidates."""
    units: dict[str, list[str]] = {}
    for name in errors:
        units.setdefault(_fused_name(name) if fused else name, []).append(name)
    table = {
        unit: {
            label: Cost(
                error=sum(errors[name][label] for name in names),
                bits=sum(
                    shapes[name][0] * shapes[name][1] * candidates[label].bits_per_weight(shapes[name][1])
                    for name in names
                ),
            )
            for label in errors[names[0]]
        }
        for unit, names in units.items()
    }
    weights = sum(rows * width for rows, width in shapes.values())
    chosen = least_error(table, budget * weights)
    return {name: candidates[chosen[unit]] for unit, names in units.items() for name in names}


def _fused_name(name: str) -> str:
    """The same for layers that an engine such as vLLM makes one of."""
    for part, whole in {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}.items():
        name = name.replace(part, whole) if name.endswith(part) else name
    return name


def _measure(job: Job, candidates: Mapping[str, Grid]) -> Errors:
    """The relative error of every linear layer at every candidate whose groups divide its width."""
    path = job.destination / MEASURED
    found: Errors = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    files = TensorFiles(job.source)
    for index, prefix in enumerate(tqdm(layer_prefixes(job, files), desc="measuring", unit="layer")):
        if any(name.startswith(prefix) for name in found):
            continue  # measured before an interruption
        layer = read_layer(job, files, index, prefix)
        errors: Errors = {prefix + linear: {} for linear in layer.inputs}
        for label, grid in candidates.items():
            fitting = {name: grid for name, known in layer.inputs.items() if grid.fitted(len(known.mean)) == grid}
            for name, solved in solve_layer(layer, fitting, TRIAL).items():
                weight, gram = layer.weight(name), layer.inputs[name].gram
                lost = output_error(solved.weight() - weight, gram).sum() / output_error(weight, gram).sum()
                errors[prefix + name][label] = round(lost.item(), 9)
        found |= errors
        write_json(path, found)
    return found
