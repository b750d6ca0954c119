"""Press one decoder layer after another, and write the model without ever holding it whole.

A layer that is done lies in a file of its own, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.errors import TaskError
from tasks.formats import Format
from tasks.grid import Precision, QuantizedWeight
from tasks.output import write_json
from tasks.quantizers import QuantizeJob
from tasks.quantizers.layer import Layer
from tasks.tensor_files import TensorFiles, join, save


class Parts:
    """The tensors of a pressed model on their way to disk: a file for each decoder layer, and for each tensor outside.

    dtype: of all that is not quantized.
    """

    def __init__(self, job: QuantizeJob, form: Format, dtype: torch.dtype) -> None:
        self.files = TensorFiles(job.source)
        self._job, self._format, self.dtype = job, form, dtype
        self._folder = job.destination / "parts.part"
        self._folder.mkdir(exist_ok=True)
        self.prefixes = layer_prefixes(job.source, self.files)

    def missing(self) -> list[int]:
        """The decoder layers that are still to be pressed."""
        return [index for index, prefix in enumerate(self.prefixes) if not self._path(prefix).exists()]

    def outside(self) -> list[str]:
        """Names of the model's tensors outside the decoder layers."""
        return [name for name in self.files if not name.startswith(tuple(self.prefixes))]

    def write_layer(
        self, layer: Layer, solved: Mapping[str, QuantizedWeight], precisions: Mapping[str, Precision]
    ) -> None:
        """A decoder layer, of which the linear layers in `solved` are quantized."""
        tensors = {
            layer.prefix + name: self._stored(tensor)
            for name, tensor in layer.tensors.items()
            if name.removesuffix(".weight") not in solved
        }
        for linear, weight in solved.items():
            tensors |= self._packed(layer.prefix + linear, weight, precisions[linear])
        save(tensors, self._path(layer.prefix))

    def write_linear(self, name: str, weight: QuantizedWeight, precision: Precision) -> None:
        """A quantized layer outside the decoder layers."""
        save(self._packed(name, weight, precision), self._path(f"{name}."))

    def write_dense(self, names: Iterable[str]) -> None:
        """Tensors outside the decoder layers that are not quantized."""
        for name in names:
            save({name: self._stored(self.files.read(name))}, self._path(f"{name}."))

    def finish(self, quantization_config: dict[str, Any]) -> None:
        """Join the parts to the model's weights, and write config.json."""
        join(sorted(self._folder.glob("*.safetensors")), self._job.destination)
        shutil.rmtree(self._folder)
        described = json.loads((self._job.source / "config.json").read_text(encoding="utf-8"))
        described |= {
            "quantization_config": quantization_config,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        write_json(self._job.destination / "config.json", described)

    def _path(self, prefix: str) -> Path:
        return self._folder / f"{prefix}safetensors"

    def _packed(self, name: str, weight: QuantizedWeight, precision: Precision) -> dict[str, Tensor]:
        return {f"{name}.{end}": tensor for end, tensor in self._format.pack(weight, precision).items()}

    def _stored(self, tensor: Tensor) -> Tensor:
        """As it goes into the file. TaskError if a number is too large for it, as may happen to a bfloat16 in
        float16."""
        stored = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        if self.dtype == torch.float16 and stored.isinf().any():
            raise TaskError(
                f"the model holds numbers up to {tensor.abs().max():.3g}, but float16 ends at 65504; "
                "set format to compressed-tensors and leave scale_dtype out, which keeps the model's own precision"
            )
        return stored


def layer_prefixes(source: Path, files: TensorFiles) -> list[str]:
    """What the names of each decoder layer's tensors begin with."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    name = next(name for name in files if ".layers." in name)
    start = name[: name.index(".layers.") + len(".layers.")]
    return [f"{start}{index}." for index in range(config["num_hidden_layers"])]
