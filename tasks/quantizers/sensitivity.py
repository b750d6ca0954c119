"""What each precision would cost in each linear layer: the divergence of the model that rounding it alone brings.

The error of a layer's output comes from the Gram matrix of its inputs, for every candidate. What an error costs differs
from layer to layer, and is measured: one rounded layer after another, its effect carried on through all later layers.
All these streams pass through the model side by side, so one layer's weights are in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from tasks.grid import Grid
from tasks.model.decoder import Decoder
from tasks.quantizers import QuantizeJob
from tasks.quantizers.grouped import Rounding, solve_layer
from tasks.quantizers.layerwise import read_layer
from tasks.solvers import output_error
from tasks.tensor_files import save

SEQUENCES, LENGTH = 4, 64  # of the calibration text, that the streams are of; half as many twice as long say less
STATE, HIDDEN, FOUND = "measured.part.safetensors", "hidden", "found"
DAMPING = 0.05
FINE = 8  # bits with which so little is lost that the way of rounding does not matter
# the plainest way that tells the precisions apart
TRIAL = Rounding(scale=False, clip=False, gptq=True, act_order=True, damping=DAMPING, refine=0, propagate=False)


@dataclass(frozen=True)
class Sensitivity:
    """Of one linear layer. errors: of its output at each candidate, squared, as a share of the output; divergence: of
    the whole model from the baseline where it alone is at the coarsest candidate, nats a token."""

    errors: Mapping[str, float]
    divergence: float

    def costs(self) -> dict[str, float]:
        """The divergence at each candidate: as near as the errors are proportional to it (arXiv 2411.17525)."""
        coarsest = max(self.errors.values()) or 1.0
        return {label: self.divergence * error / coarsest for label, error in self.errors.items()}


def measure(job: QuantizeJob, candidates: Mapping[str, Grid]) -> dict[str, Sensitivity]:
    """By the whole names of all linear layers. A run that was interrupted goes on at its layer.

    Memory beside a layer and its statistics: a stream of `SEQUENCES` x `LENGTH` x channels for each linear layer.
    """
    decoder = Decoder(job.source, torch.float32, job.device)
    hidden = decoder.embed([job.tokens[:SEQUENCES, :LENGTH]])[0]
    state = job.destination / STATE
    first, errors, streams = _resume(state, job.device)
    hidden = streams.pop(HIDDEN, hidden)
    bar = tqdm(range(first, len(decoder)), desc="measuring", unit="layer", initial=first, total=len(decoder))
    for index in bar:
        prefix = decoder.layer_prefix(index)
        known = read_layer(job, decoder.files, index, prefix)
        known.damp(DAMPING)
        rounded: dict[str, Tensor] = {}
        for label, grid in candidates.items():
            fitting = {name: grid for name in known.inputs if grid.fitted(known.weight(name).shape[1]) == grid}
            how = replace(TRIAL, gptq=grid.bits < FINE)
            for name, solved in solve_layer(known, fitting, how).items():
                weight, gram = known.weight(name), known.inputs[name].gram
                new = solved.weight()
                error = (output_error(new - weight, gram).sum() / output_error(weight, gram).sum()).item()
                own = errors.setdefault(prefix + name, {})
                if error > max(own.values(), default=-1.0):
                    rounded[name] = new
                own[label] = error
        with decoder.layer(index) as layer:
            streams = {name: decoder.run(index, layer, stream) for name, stream in streams.items()}
            for name, weight in rounded.items():
                with _swapped(layer.get_submodule(name), weight):
                    streams[prefix + name] = decoder.run(index, layer, hidden)
            hidden = decoder.run(index, layer, hidden)
        save({HIDDEN: hidden, **streams}, state, {FOUND: json.dumps(errors)})
    found = {}
    with decoder.head() as head:
        baseline = head(hidden).log_softmax(-1)
        share = baseline.exp()
        for name, stream in tqdm(streams.items(), desc="divergence", unit="layer"):
            found[name] = Sensitivity(errors[name], _divergence(baseline, share, head(stream).log_softmax(-1)))
    return found


def _resume(state: Path, device: str) -> tuple[int, dict[str, dict[str, float]], dict[str, Tensor]]:
    """The layer to go on with, the errors before it, and the streams that it reads."""
    if not state.exists():
        return 0, {}, {}
    with safe_open(state, framework="pt", device=device) as file:
        errors = json.loads(file.metadata()[FOUND])
        streams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    done = {name.partition(".layers.")[2].partition(".")[0] for name in errors}
    return len(done), errors, streams


@contextmanager
def _swapped(linear: nn.Module, weight: Tensor) -> Iterator[None]:
    """The linear layer with another weight."""
    own = linear.weight
    linear.weight = nn.Parameter(weight, requires_grad=False)
    yield
    linear.weight = own


def _divergence(baseline: Tensor, share: Tensor, other: Tensor) -> float:
    """Kullback-Leibler divergence, mean over the tokens, of log-probabilities [rows, tokens, words]; share: exp of the
    baseline's; `other` is overwritten, for fresh memory of this size costs more than the arithmetic."""
    return max(0.0, torch.sub(baseline, other, out=other).mul_(share).sum(-1).double().mean().item())
