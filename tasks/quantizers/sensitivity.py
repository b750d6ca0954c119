"""The sensitivity of each linear layer: the model's divergence when only that layer is quantized.

The output error of a layer is computed from the Gram matrix of its inputs, for every candidate. The divergence that an
error causes differs by layer and is measured: each layer is rounded alone, and its effect propagated through all later
layers. All these streams pass through the model together, so one layer's weights are in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from tasks.activation_rounding import Activations, dequantized
from tasks.activations.hearing import hearing
from tasks.grid import Precision
from tasks.model.decoder import Decoder
from tasks.model.linears import Origins, join
from tasks.model.products import Product
from tasks.model.structure import LayerStructure, read_structure
from tasks.quantizers import QuantizeJob
from tasks.quantizers.layer import Layer, read_layer
from tasks.quantizers.shares import whole_layer
from tasks.quantizers.solve import Recipe, round_layer, scale_channels
from tasks.solvers import output_error
from tasks.tensor_files import save

SEQUENCES, LENGTH = 4, 64  # of the calibration set, in a stream; half as many of twice the length are less informative
STATE, HIDDEN, FOUND, NEXT = "measured.part.safetensors", "hidden", "found", "next"
DAMPING = 0.05
FINE = 8  # bits with which the rounding method does not matter
# the simplest recipe that distinguishes the precisions
TRIAL = Recipe(rounding="gptq", damping=DAMPING)


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of one linear layer. errors: its squared output error at each candidate, relative to the output;
    divergence: of the model from the baseline with only this layer at the coarsest candidate, nats per token; of the
    experts of a layer, measured together, an equal share each."""

    errors: Mapping[str, float]
    divergence: float

    def costs(self) -> dict[str, float]:
        """The divergence at each candidate, assumed proportional to the errors (arXiv 2411.17525)."""
        coarsest = max(self.errors.values()) or 1.0
        return {label: self.divergence * error / coarsest for label, error in self.errors.items()}


def measure(job: QuantizeJob, candidates: Mapping[str, Precision | None]) -> dict[str, Sensitivity]:
    """Measure the sensitivity of all linear layers, by full name; a candidate of None is unquantized.

    An interrupted run resumes at its layer. Memory besides a layer and its statistics: a stream of `SEQUENCES` x
    `LENGTH` x channels for each linear layer.
    """
    decoder = Decoder(job.source, torch.float32, job.device)
    layers = read_structure(job.statistics)
    hidden = decoder.embed([job.tokens[:SEQUENCES, :LENGTH]])[0]
    state = job.destination / STATE
    first, errors, streams = _resume(state, job.device)
    hidden = streams.pop(HIDDEN, hidden)
    bar = tqdm(range(first, len(decoder)), desc="measuring", unit="layer", initial=first, total=len(decoder))
    for index in bar:
        if index not in decoder.order:
            continue
        structure, origins = layers[index], decoder.origins(index)
        whole = whole_layer(index, structure, decoder.files.names_below(structure.prefix))
        known = read_layer(job, decoder.files, whole)
        for linears in known.inputs.groups:
            known.damp(linears, DAMPING)
        with decoder.layer(index) as layer:
            streams = {name: decoder.run(index, layer, stream) for name, stream in streams.items()}
            with _recorded_inputs(layer, structure, origins) as inputs:
                after = decoder.run(index, layer, hidden)
        coarsest: dict[str, Tensor] = {}
        for label, precision in candidates.items():
            for name, (error, weight) in _trial(known, precision, inputs, job.variant.smoothing).items():
                own = errors.setdefault(structure.prefix + name, {})
                if error > max(own.values(), default=-1.0):
                    coarsest[name] = weight
                own[label] = error
        for unit, together in _together(structure, coarsest).items():
            changed = known.tensors | {f"{name}.weight": coarsest[name] for name in together}
            with decoder.layer(index, join(changed, structure.linears)) as layer:
                streams[structure.prefix + unit] = decoder.run(index, layer, hidden)
        hidden = after
        save({HIDDEN: hidden, **streams}, state, {FOUND: json.dumps(errors), NEXT: str(index + 1)})
    units = {
        layer.prefix + unit: [layer.prefix + name for name in together]
        for layer in layers
        for unit, together in _together(layer, [n for n in layer.linears if layer.prefix + n in errors]).items()
    }
    found: dict[str, Sensitivity] = {}
    with decoder.head() as head:
        baseline = head(hidden).log_softmax(-1)
        share = baseline.exp()
        for unit, names in tqdm(units.items(), desc="divergence", unit="layer"):
            far = divergence(baseline, share, head(streams[unit])) / len(names)
            found |= {name: Sensitivity(errors[name], far) for name in names}
    return {name: found[name] for name in errors}  # in this order: streams read from a file have another one


def _together(structure: LayerStructure, names: Iterable[str]) -> dict[str, list[str]]:
    """Linear layers whose effect is measured together, by a name for them: each alone, but all experts of the layer,
    which share one precision, at once."""
    experts = {name for group in structure.groups if group[0] in structure.experts for name in group}
    inside = [name for name in names if name in experts]
    return {name: [name] for name in names if name not in experts} | ({"experts": inside} if inside else {})


def stream_passes(layers: int, linears: int) -> int:
    """How many streams of earlier layers pass through a decoder layer, summed over `layers` with `linears` linear
    layers each: the part of `measure` that grows with the square of the layers."""
    return linears * layers * (layers - 1) // 2


def held_bytes(streams: int, hidden: int, words: int) -> int:
    """The memory, bytes, that `measure` holds at its end: the streams twice, each [tokens, hidden], the output layer
    and predictions of two streams, with their logarithms."""
    tokens = SEQUENCES * LENGTH
    return 4 * (2 * streams * tokens * hidden + words * hidden + 4 * tokens * words)


def _trial(
    known: Layer, precision: Precision | None, inputs: Mapping[str, Tensor], smoothing: float | None
) -> dict[str, tuple[float, Tensor]]:
    """The error and the rounded weight of each linear layer whose width the precision's groups divide.

    inputs: of some tokens, for the error of rounding the smoothed activations.
    """
    if precision is None:
        return {name: (0.0, known.weight(name)) for name in known.inputs}
    grid = precision.grid
    fitting = {name: precision for name in known.inputs if grid.fitted(known.weight(name).shape[1]) == grid}
    recipe = replace(TRIAL, rounding="gptq" if grid.bits < FINE else "nearest", smoothing=smoothing)
    layer = replace(known, tensors=dict(known.tensors), scaled=[])
    rounds_activations = precision.symmetric_activations is not None
    if rounds_activations and smoothing is not None:
        scale_channels(layer, fitting, recipe, torch.float32)
    found = {}
    for name, solved in round_layer(layer, fitting, recipe).items():
        weight, gram, new = layer.weight(name), layer.inputs[name].gram, solved.weight()
        error = _relative(output_error(new - weight, gram).sum(), output_error(weight, gram).sum())
        factor = known.inputs[name].mean / layer.inputs[name].mean if rounds_activations else None
        if factor is not None and name in inputs:
            factor = torch.where(factor.isfinite(), factor, 1)
            x = inputs[name] / factor
            change = dequantized(Activations(bool(precision.symmetric_activations)), x) - x
            error += _relative((change @ weight.T).square().sum(), (x @ weight.T).square().sum())
            new = new / factor
        found[name] = error, new
    return found


def _relative(error: Tensor, output: Tensor) -> float:
    """The share of the output that is wrong; 0 for a layer without any output, as one whose weights are all zero."""
    return (error / output).item() if error else 0.0


@contextmanager
def _recorded_inputs(layer: nn.Module, structure: LayerStructure, origins: Origins) -> Iterator[dict[str, Tensor]]:
    """The inputs of the layer's linear layers in the last pass, [..., channels]; not of experts without a token."""
    inputs: dict[str, Tensor] = {}

    def record(_: str, names: list[str], product: Product) -> None:
        inputs.update(dict.fromkeys(names, product.x))

    with hearing(layer, structure, origins, record):
        yield inputs


def _resume(state: Path, device: str) -> tuple[int, dict[str, dict[str, float]], dict[str, Tensor]]:
    """The layer to resume at, the errors of earlier layers, and the layer's input streams."""
    if not state.exists():
        return 0, {}, {}
    with safe_open(state, framework="pt", device=device) as file:
        errors = json.loads(file.metadata()[FOUND])
        streams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return int(file.metadata()[NEXT]), errors, streams


def divergence(baseline: Tensor, share: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence over the tokens, all tensors [rows, tokens, vocabulary]. baseline:
    log-probabilities, share: their exp, other: logits."""
    found = other.log_softmax(-1)
    # in place: allocating memory of this size costs more than the arithmetic
    return max(0.0, torch.sub(baseline, found, out=found).mul_(share).sum(-1).double().mean().item())
