"""Read a quantized model directory in any format."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from torch import Tensor

from tasks.errors import TaskError
from tasks.formats import Format, StoredLinear, load_format
from tasks.tensor_files import TensorFiles


class StoredModel:
    """The tensors of a model directory, with quantized linear layers unpacked.

    quantized: names of these layers, such as model.layers.0.mlp.up_proj. dense: names of all other tensors.
    TaskError if the directory is not a model directory, or has an unsupported quantization.
    """

    def __init__(self, directory: Path) -> None:
        self._files = TensorFiles(directory)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self._config = config.get("quantization_config") or {}
        self._format = self._read_format(directory)
        # a quantized linear layer has more tensors than weight and bias
        ends = {"weight_packed", "weight_scale", "qweight"} if self._format else set()
        stems = {stem for stem, _, end in (name.rpartition(".") for name in self._files) if end in ends}
        parts = {f"{stem}.{end}" for stem in stems for end in (self._format.parts if self._format else ())}
        named = (name.rpartition(".")[0] for name in self._files)
        self.quantized = list(dict.fromkeys(stem for stem in named if stem in stems))
        self.dense = [name for name in self._files if name not in parts]

    def linear(self, name: str) -> StoredLinear:
        """Read one of `quantized`."""
        assert self._format is not None  # otherwise `quantized` is empty
        tensors = {end: self._files.read(f"{name}.{end}") for end in self._ends(name)}
        return self._format.unpack(name, tensors, self._config)

    def tensor(self, name: str) -> Tensor:
        """Read one of `dense`."""
        return self._files.read(name)

    def weights(self, name: str) -> Tensor:
        """The weight of a linear layer or an embedding, quantized or not: float32 [rows, width]."""
        if name in self.quantized:
            return self.linear(name).weight.weight()
        return self.tensor(f"{name}.weight").float()

    def bits_per_weight(self) -> float | None:
        """Bits per weight on disk of the decoder's linear layers, including scales, zero points and unquantized
        layers. None if there are no decoder layers."""
        bits = weights = 0
        for name in self.quantized:
            if ".layers." in name:
                sizes = {end: self._files.entry(f"{name}.{end}").shape for end in self._ends(name)}
                assert self._format is not None
                rows, width = self._format.shape(sizes, partial(self._part, name))
                weights += rows * width
                ends = [end for end, shape in sizes.items() if len(shape) > 1]
                bits += sum(8 * self._files.entry(f"{name}.{end}").bytes for end in ends)
        for name in self.dense:
            entry = self._files.entry(name)
            if ".layers." in name and len(entry.shape) > 1:
                weights += entry.count
                bits += 8 * entry.bytes
        return round(bits / weights, 3) if weights else None

    def _part(self, name: str, end: str) -> Tensor:
        return self._files.read(f"{name}.{end}")

    def _ends(self, name: str) -> list[str]:
        assert self._format is not None
        return [end for end in self._format.parts if f"{name}.{end}" in self._files]

    def _read_format(self, directory: Path) -> Format | None:
        method = self._config.get("quant_method")
        if method is None:
            return None
        if method not in ("compressed-tensors", "awq", "gptq"):
            raise TaskError(f"{directory} is quantized by {method!r}; supported: compressed-tensors, awq, gptq")
        found = load_format(method)
        found.check_config(self._config, str(directory))
        return found
