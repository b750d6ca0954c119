"""Statistics of a layer's inputs after quantizing the layers before it, instead of those of the statistics stage.

As in the GPTQ paper, each layer sees the errors of the layers before it. Costs two more passes over the calibration
set for every variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tasks.activations.gram import experts_with_few, fill_experts, recording_inputs
from tasks.activations.importance import load_importance
from tasks.activations.inputs import Inputs
from tasks.activations.memory import EXPERT_TOKENS
from tasks.activations.store import Input
from tasks.grid import Precision
from tasks.model.decoder import Decoder
from tasks.model.rounding import rounded_products
from tasks.model.structure import read_structure
from tasks.quantizers import QuantizeJob
from tasks.tensor_files import save

HIDDEN = "hidden"


class PropagatedActivations:
    """The calibration set's activations in the quantized model, before a layer.

    Saved in the job's destination, so that an interrupted run resumes: the activations before a layer are kept until
    the layer is written, together with those after it.
    """

    def __init__(self, job: QuantizeJob) -> None:
        self._job = job
        self._decoder = Decoder(job.source, torch.float32, job.device)
        self._structure = read_structure(job.statistics)
        self._embedded = self._decoder.embed(list(job.tokens.split(1)))

    def inputs(self, index: int) -> Inputs:
        """The statistics of each linear layer's input in layer `index`."""
        own, origins = self._structure[index], self._decoder.origins(index)
        known = load_importance(self._job.statistics, index, self._job.device)
        weights = {name: weight for name, weight in known.items() if name not in own.experts}  # routed otherwise here
        with self._decoder.layer(index) as layer, recording_inputs(layer, own, origins, weights) as sums:
            for number, batch in enumerate(self._before(index)):
                self._decoder.run(index, layer, batch, number)
        few = experts_with_few(sums, own, EXPERT_TOKENS)
        fill_experts(sums, own, few, torch.device(self._job.device))
        inputs = {first: Input(**one.tensors()) for first, one in sums.items()}
        return Inputs.of(inputs, [one.readers for one in sums.values()])

    def advance(
        self, index: int, tensors: Mapping[str, Tensor] | None, precisions: Mapping[str, Precision] | None = None
    ) -> None:
        """Run layer `index`; tensors: by name suffix; None: those of the source.

        precisions: of its linear layers, for quantized inputs.
        """
        hidden = self._before(index)
        rounding = {
            name: one.symmetric_activations
            for name, one in (precisions or {}).items()
            if one.symmetric_activations is not None
        }
        origins = self._decoder.origins(index)
        with self._decoder.layer(index, tensors) as layer, rounded_products(layer, origins.holds, rounding):
            after = torch.cat([self._decoder.run(index, layer, batch, n) for n, batch in enumerate(hidden)])
        save({HIDDEN: after}, self._file(index + 1))
        self._file(index - 1).unlink(missing_ok=True)

    def close(self) -> None:
        """Delete the saved files."""
        for path in self._job.destination.glob("stream.*.part.safetensors"):
            path.unlink()

    def _before(self, index: int) -> list[Tensor]:
        if index == 0:
            return self._embedded
        if index - 1 not in self._decoder.order:  # no text passes through it
            return self._before(index - 1)
        if not self._file(index).exists():
            self.advance(index - 1, None)  # a skipped layer
        return list(load_file(self._file(index), device=self._job.device)[HIDDEN].split(1))

    def _file(self, index: int) -> Path:
        return self._job.destination / f"stream.{index}.part.safetensors"
