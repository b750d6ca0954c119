"""A decoder layer for the solvers: its weights, and the statistics of its linear layers' inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tasks.activations.store import Input, load_statistics
from tasks.grid import QuantizedWeight
from tasks.model.family import SOURCES
from tasks.quantizers import QuantizeJob
from tasks.solvers import damped
from tasks.tensor_files import TensorFiles


@dataclass
class Layer:
    """One decoder layer. prefix: of its tensor names in the model; tensors: by the rest of the name, weights as float32
    on the job's device; inputs: by linear layer."""

    index: int
    prefix: str
    tensors: dict[str, Tensor]
    inputs: Mapping[str, Input]

    def weight(self, linear: str) -> Tensor:
        """The weight of a linear layer: [rows, width]."""
        return self.tensors[f"{linear}.weight"]

    def readers(self) -> Iterator[tuple[list[str], Input]]:
        """Groups of linear layers with the same input, and that input."""
        groups: dict[int, list[str]] = {}
        for linear, known in self.inputs.items():
            groups.setdefault(id(known), []).append(linear)
        for names in groups.values():
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

    def scalable(self) -> Iterator[tuple[str, list[str]]]:
        """Modules that can absorb a factor per output channel, and the linear layers that read their output."""
        for source, linears in SOURCES.items():
            # with grouped-query attention, a value feeds several channels
            if len(self.weight(source)) == len(self.inputs[linears[0]].mean):
                yield source, linears

    def damp(self, linears: list[str], share: float) -> None:
        """Add `share` of its mean diagonal to the diagonal of the Gram matrix shared by `linears`. This reduces the
        effect of the calibration text's correlations, and makes the matrix invertible for GPTQ."""
        known = self.inputs[linears[0]]
        self.inputs = {**self.inputs, **dict.fromkeys(linears, replace(known, gram=damped(known.gram, share)))}

    def scale_input(self, source: str, linears: list[str], scale: Tensor, dtype: torch.dtype) -> None:
        """Multiply the weights of `linears` by `scale` [width] and divide the output of `source` by it.

        A norm's weight is stored in `dtype`; its rounding is compensated exactly in the layers that read it.
        """
        weight = self.tensors[f"{source}.weight"]
        divided = weight / (scale if weight.dim() == 1 else scale[:, None])
        if weight.dim() == 1:
            divided = divided.to(dtype).float()
            scale = torch.where(divided == 0, scale, weight / divided)
        self.tensors[f"{source}.weight"] = divided
        if (bias := self.tensors.get(f"{source}.bias")) is not None:
            self.tensors[f"{source}.bias"] = bias / scale
        for name in linears:
            self.tensors[f"{name}.weight"] = self.weight(name) * scale
        self.inputs = {**self.inputs, **dict.fromkeys(linears, _scaled(self.inputs[linears[0]], scale))}


def _scaled(known: Input, scale: Tensor) -> Input:
    """The statistics of an input divided by `scale` [channels]."""
    return Input(known.gram / scale[:, None] / scale, known.largest / scale, known.mean / scale)


def read_layer(job: QuantizeJob, files: TensorFiles, index: int, prefix: str) -> Layer:
    """Read a layer with the statistics of its inputs."""
    tensors = {name: tensor.to(job.device, torch.float32) for name, tensor in files.below(prefix).items()}
    return Layer(index, prefix, tensors, load_statistics(job.statistics, index, job.device))
