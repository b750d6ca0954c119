"""A decoder layer for the solvers: its weights, and the statistics of its linear layers' inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tasks.activations.inputs import Inputs, read_inputs
from tasks.activations.store import Input
from tasks.grid import QuantizedWeight
from tasks.model.linears import split
from tasks.model.pairs import Pair
from tasks.model.structure import LayerStructure
from tasks.quantizers import QuantizeJob
from tasks.quantizers.shares import Share
from tasks.solvers import damped
from tasks.tensor_files import TensorFiles


@dataclass
class Layer:
    """One decoder layer, or a share of it. tensors: by the rest of their names on disk, weights as float32 on the job's
    device, those of a stack as matrices of their own; inputs: by linear layer; scaled: the pairs whose factors were
    moved; grouped: whether those may in which several channels follow one row."""

    index: int
    structure: LayerStructure
    tensors: dict[str, Tensor]
    inputs: Inputs
    scaled: list[Pair] = field(default_factory=list)
    grouped: bool = False

    @property
    def prefix(self) -> str:
        """The prefix of its tensor names in the model."""
        return self.structure.prefix

    def weight(self, linear: str) -> Tensor:
        """The weight of a linear layer: [rows, width]."""
        return self.tensors[f"{linear}.weight"]

    def readers(self) -> Iterator[tuple[list[str], Input]]:
        """Groups of linear layers with the same input, and that input."""
        for names in self.inputs.groups:
            yield names, self.inputs[names[0]]

    def stacked(self, linears: list[str]) -> Tensor:
        """The stacked weights of layers with the same input: solvers treat rows independently."""
        return torch.cat([self.weight(name) for name in linears])

    def split(self, solved: QuantizedWeight, linears: list[str]) -> Iterator[tuple[str, QuantizedWeight]]:
        """Split the solution of `stacked` into its layers."""
        start = 0
        for name in linears:
            rows = slice(start, start + len(self.weight(name)))
            yield name, solved.rows(rows)
            start = rows.stop

    def scalable(self) -> Iterator[Pair]:
        """The pairs whose factors can move, norms first."""
        return (
            pair for pair in self.structure.usable(self.grouped) if all(name in self.inputs for name in pair.readers)
        )

    def damp(self, linears: list[str], share: float) -> None:
        """Add `share` of its mean diagonal to the diagonal of the Gram matrix shared by `linears`. This reduces the
        effect of the calibration text's correlations, and makes the matrix invertible for GPTQ."""
        self.inputs = self.inputs.changed(linears, lambda known: replace(known, gram=damped(known.gram, share)))

    def scale_input(self, pair: Pair, scale: Tensor, dtype: torch.dtype) -> None:
        """Multiply the weights of the pair's readers by `scale` [width] and divide what its source makes by it.
        Channels that follow one row take the geometric mean of theirs.

        A norm's weight is stored in `dtype`; its rounding is compensated exactly in the layers that read it.
        """
        self.scaled.append(pair)
        weight = self.tensors[f"{pair.source}.weight"]
        if pair.offset is not None:
            whole = weight + pair.offset if pair.offset else weight
            divided = whole / scale
            divided = (divided - pair.offset if pair.offset else divided).to(dtype).float()
            made = divided + pair.offset if pair.offset else divided
            scale = torch.where(made == 0, scale, whole / made)
            self.tensors[f"{pair.source}.weight"] = divided
            self._divide_bias(pair, scale)
        else:
            rows = torch.tensor(pair.rows, device=scale.device)
            if pair.grouped:
                scale = _by_row(scale, rows)
            factor = torch.ones(len(weight), device=scale.device)
            factor[rows] = scale if pair.power == 1 else scale ** (1 / pair.power)
            self.tensors[f"{pair.source}.weight"] = weight / factor[:, None]
            self._divide_bias(pair, factor)
        for name in pair.readers:
            self.tensors[f"{name}.weight"] = self.weight(name) * scale
        self.inputs = self.inputs.changed(pair.readers, lambda known: _scaled(known, scale))

    def _divide_bias(self, pair: Pair, factor: Tensor) -> None:
        if (bias := self.tensors.get(f"{pair.source}.bias")) is not None:
            self.tensors[f"{pair.source}.bias"] = bias / factor


def _by_row(scale: Tensor, rows: Tensor) -> Tensor:
    """For each channel the geometric mean over the channels that follow the same row."""
    size = int(rows.max()) + 1
    total, count = torch.zeros(2, size, device=scale.device)
    total.index_add_(0, rows, scale.log())
    count.index_add_(0, rows, torch.ones_like(scale))
    means: Tensor = (total / count.clamp(min=1)).exp()
    return means[rows]


def _scaled(known: Input, scale: Tensor) -> Input:
    """The statistics of an input divided by `scale` [channels]."""
    return Input(known.gram / scale[:, None] / scale, known.largest / scale, known.mean / scale)


def read_layer(job: QuantizeJob, files: TensorFiles, share: Share) -> Layer:
    """Read a layer, or a share of it, with the statistics of its inputs, which are read as they are needed."""
    structure = share.structure
    names = [*share.others, *dict.fromkeys(linear.tensor for linear in structure.linears.values())]
    stored = split({name: files.read(structure.prefix + name) for name in names}, structure.linears)
    tensors = {name: tensor.to(job.device, torch.float32) for name, tensor in stored.items()}
    inputs = read_inputs(job.statistics, job.source, share.layer, job.device, structure.linears)
    return Layer(share.layer, structure, tensors, inputs, grouped=job.variant.grouped_values)
