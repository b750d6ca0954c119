"""Write a quantized model layer by layer, without holding it whole in memory.

Each finished layer is saved to its own file, so an interrupted run resumes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.errors import TaskError
from tasks.formats import Format
from tasks.grid import Precision, QuantizedWeight
from tasks.model.linears import Linear, join
from tasks.model.stored_places import write_places
from tasks.model.structure import read_structure
from tasks.output import write_json
from tasks.quantizers import QuantizeJob
from tasks.quantizers.checks import check_solved
from tasks.quantizers.layer import Layer
from tasks.tensor_files import TensorFiles, save
from tasks.tensor_files import join as join_files


class Parts:
    """The parts of a quantized model on disk: a file for each decoder layer, and for each tensor outside.

    dtype: of unquantized tensors.
    """

    def __init__(self, job: QuantizeJob, form: Format, dtype: torch.dtype) -> None:
        self.files = TensorFiles(job.source)
        self._job, self._format, self.dtype = job, form, dtype
        self._folder = job.destination / "parts.part"
        self._folder.mkdir(exist_ok=True)
        self.structure = read_structure(job.statistics)
        self.prefixes = [layer.prefix for layer in self.structure]

    def missing(self) -> list[int]:
        """The decoder layers still to be quantized."""
        return [index for index, prefix in enumerate(self.prefixes) if not self._path(prefix).exists()]

    def outside(self) -> list[str]:
        """Names of the model's tensors outside the decoder layers."""
        return [name for name in self.files if not name.startswith(tuple(self.prefixes))]

    def write_layer(
        self, layer: Layer, solved: Mapping[str, QuantizedWeight], precisions: Mapping[str, Precision]
    ) -> None:
        """Write a decoder layer; the linear layers in `solved` are quantized. TaskError if one is another's."""
        check_solved(layer, solved)
        dense = {name: own for name, own in layer.tensors.items() if name.removesuffix(".weight") not in solved}
        stored = join(dense, layer.structure.linears)
        tensors = {layer.prefix + name: self._stored(tensor) for name, tensor in stored.items()}
        for linear, weight in solved.items():
            tensors |= self._packed(layer.prefix + linear, weight, precisions[linear])
        save(tensors, self._path(layer.prefix))

    def write_linear(self, name: str, weight: QuantizedWeight, precision: Precision) -> None:
        """Write a quantized layer outside the decoder layers."""
        save(self._packed(name, weight, precision), self._path(f"{name}."))

    def write_dense(self, names: Iterable[str]) -> None:
        """Write unquantized tensors outside the decoder layers."""
        for name in names:
            save({name: self._stored(self.files.read(name))}, self._path(f"{name}."))

    def finish(self, quantization_config: dict[str, Any]) -> None:
        """Join the parts into the model's weights, and write config.json."""
        join_files(sorted(self._folder.glob("*.safetensors")), self._job.destination)
        shutil.rmtree(self._folder)
        described = json.loads((self._job.source / "config.json").read_text(encoding="utf-8"))
        described |= {
            "quantization_config": quantization_config,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        write_places(self._job.destination, self._places())
        write_json(self._job.destination / "config.json", described)

    def _places(self) -> dict[str, Linear]:
        """The quantized layers whose weights the source does not store as NAME.weight, [rows, width]."""
        written = set(TensorFiles(self._job.destination))
        ends = {name.rpartition(".")[0] for name in written if name.rpartition(".")[2] in self._format.parts}
        return {
            layer.prefix + name: replace(linear, tensor=layer.prefix + linear.tensor)
            for layer in self.structure
            for name, linear in layer.linears.items()
            if (linear.stacked or linear.transposed) and layer.prefix + name in ends
        }

    def _path(self, prefix: str) -> Path:
        return self._folder / f"{prefix}safetensors"

    def _packed(self, name: str, weight: QuantizedWeight, precision: Precision) -> dict[str, Tensor]:
        return {f"{name}.{end}": tensor for end, tensor in self._format.pack(weight, precision).items()}

    def _stored(self, tensor: Tensor) -> Tensor:
        """Convert to the stored dtype. TaskError if a value is too large, as a bfloat16 may be for float16."""
        stored = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        if self.dtype == torch.float16 and stored.isinf().any():
            raise TaskError(
                f"the model has values up to {tensor.abs().max():.3g}, but float16 ends at 65504; "
                "set format to compressed-tensors and leave out scale_dtype, which keeps the model's dtype"
            )
        return stored
