"""Quantize the output layer, like the decoder's linear layers, and the embedding, by rounding to nearest."""

from __future__ import annotations

import torch
from tqdm import tqdm

from tasks.activations.store import load_statistics
from tasks.grid import Precision, QuantizedWeight
from tasks.model.layout import outer_tensor
from tasks.quantizers import QuantizeJob
from tasks.quantizers.solve import Recipe, round_weight
from tasks.solvers import damped
from tasks.solvers.awq import search_clip
from tasks.tensor_files import OUTPUT, TensorFiles

ROWS = 1 << 14  # of the output layer in memory at once


def solve_outer(
    job: QuantizeJob, files: TensorFiles, name: str, precision: Precision, recipe: Recipe
) -> QuantizedWeight:
    """Quantize the output layer by the recipe's clipping, rounding and refining with the statistics of its inputs; an
    embedding has no such inputs and is rounded to nearest."""
    weight = files.read(f"{outer_tensor(name, files)}.weight").to(job.device, torch.float32)
    if name != OUTPUT:
        return precision.grid.round(weight)
    known = load_statistics(job.statistics, None, job.device)[OUTPUT]
    gram = damped(known.gram, recipe.damping_of([precision]))
    parts = []
    for rows in tqdm(weight.split(ROWS), desc="output layer"):
        clip = search_clip(rows, gram, precision.grid) if recipe.clip else None
        parts.append(round_weight(rows, gram, precision.grid, recipe, clip, 0.0))
    return QuantizedWeight(
        torch.cat([part.integers for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
    )
