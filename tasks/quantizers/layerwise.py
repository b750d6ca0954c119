"""Write a quantized model layer by layer, without holding it whole in memory.

Each finished layer, or share of a large one, is saved to its own file, so an interrupted run resumes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
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
from tasks.quantizers.shares import Share, shares, whole_layer
from tasks.quantizers.together import claimed
from tasks.tensor_files import TensorFiles, save
from tasks.tensor_files import join as join_files

PARTS = "parts.part"


class Parts:
    """The parts of a quantized model on disk: a file for each share of a decoder layer, and for each tensor outside.

    dtype: of unquantized tensors; quantized: the linear layers that are quantized; cut: whether layers that are large
    are cut into several shares.
    """

    def __init__(
        self, job: QuantizeJob, form: Format, dtype: torch.dtype, quantized: Collection[str] = (), cut: bool = False
    ) -> None:
        self.files = TensorFiles(job.source)
        self._job, self._format, self.dtype = job, form, dtype
        self.folder = job.destination / PARTS
        self.structure = read_structure(job.statistics)
        self.prefixes = [layer.prefix for layer in self.structure]
        self.shares = [share for index in range(len(self.structure)) for share in self._shares(index, quantized, cut)]

    def claimed(self, share: Share) -> AbstractContextManager[bool]:
        """See `claimed` in together.py."""
        return claimed(self.folder / share.file)

    def is_free(self, share: Share) -> bool:
        """Whether the share is not there, and nobody is at it."""
        with self.claimed(share) as free:
            return free

    def missing(self) -> list[Share]:
        """The shares still to be quantized."""
        return [share for share in self.shares if not (self.folder / share.file).exists()]

    def outside(self) -> list[str]:
        """Names of the model's tensors outside the decoder layers."""
        return [name for name in self.files if not name.startswith(tuple(self.prefixes))]

    def write_layer(
        self, share: Share, layer: Layer, solved: Mapping[str, QuantizedWeight], precisions: Mapping[str, Precision]
    ) -> None:
        """Write a share of a decoder layer; the linear layers in `solved` are quantized. TaskError if one is
        another's."""
        check_solved(layer, solved)
        dense = {name: own for name, own in layer.tensors.items() if name.removesuffix(".weight") not in solved}
        stored = join(dense, layer.structure.linears)
        tensors = {layer.prefix + name: self._stored(tensor) for name, tensor in stored.items()}
        for linear, weight in solved.items():
            tensors |= self._packed(layer.prefix + linear, weight, precisions[linear])
        save(tensors, self.folder / share.file)

    def write_linear(self, name: str, weight: QuantizedWeight, precision: Precision) -> None:
        """Write a quantized layer outside the decoder layers."""
        save(self._packed(name, weight, precision), self._path(name))

    def write_dense(self, names: Iterable[str]) -> None:
        """Write unquantized tensors outside the decoder layers."""
        for name in names:
            save({name: self._stored(self.files.read(name))}, self._path(name))

    def finish(self, quantization_config: dict[str, Any]) -> None:
        """Join the parts into the model's weights, and write config.json."""
        join_files(sorted(self.folder.glob("*.safetensors")), self._job.destination)
        shutil.rmtree(self.folder)
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

    def _shares(self, index: int, quantized: Collection[str], cut: bool) -> list[Share]:
        own = self.structure[index]
        names = self.files.names_below(own.prefix)
        solved = {name for name in own.linears if own.prefix + name in quantized}
        if not cut or not solved:
            return [whole_layer(index, own, names)]
        return shares(index, own, names, solved, self._job.variant.grouped_values)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

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
