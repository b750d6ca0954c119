"""A pressed model, read back from whichever of our formats it was written in.

What a layer was solved to is the same thing in all of them: integers, scales and zero points, bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tasks.errors import TaskError
from tasks.formats.autogptq import unpack_autogptq
from tasks.formats.awq_gemm import unpack_gemm
from tasks.formats.compressed import unpack_bytes, unpack_words
from tasks.grid import QuantizedWeight
from tasks.tensor_files import TensorFiles

# what a quantized linear layer consists of, by the end of its tensors' names; the first tells the format
WORDS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
BYTES = ("weight_scale", "weight")
COLUMNS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer as it was solved. bits: of an integer."""

    solved: QuantizedWeight
    bits: int


class StoredModel:
    """The tensors of a model directory, those of quantized linear layers unpacked.

    quantized: names of these layers, such as model.layers.0.mlp.up_proj. dense: names of all other tensors.
    TaskError if the directory is none of ours, or its quantization is of a kind that we do not write.
    """

    def __init__(self, directory: Path) -> None:
        self._files = TensorFiles(directory)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self._config = config.get("quantization_config") or {}
        self._method = self._config.get("quant_method")
        self._check(directory)
        names = set(self._files)
        first = {"qweight", "weight_packed"}
        stems = {stem for stem, _, end in (name.rpartition(".") for name in names) if end in first}
        stems |= {name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")}
        parts = {f"{stem}.{end}" for stem in stems for end in (*WORDS, *BYTES, *COLUMNS)}
        self.quantized = [stem for name in self._files if (stem := name.rpartition(".")[0]) in stems]
        self.quantized = list(dict.fromkeys(self.quantized))
        self.dense = [name for name in self._files if name not in parts]

    def linear(self, name: str) -> StoredLinear:
        """One of `quantized`."""
        tensors = {end: self._files.read(f"{name}.{end}") for end in self._ends(name)}
        if "weight_packed" in tensors:
            return StoredLinear(*unpack_words(tensors))
        if "weight" in tensors:
            return StoredLinear(unpack_bytes(tensors["weight"], tensors["weight_scale"]), 8)
        if self._method == "awq":
            return StoredLinear(unpack_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"]), 4)
        bits = self._config["bits"]
        return StoredLinear(unpack_autogptq(tensors["qweight"], tensors["qzeros"], tensors["scales"], bits), bits)

    def tensor(self, name: str) -> Tensor:
        """One of `dense`."""
        return self._files.read(name)

    @property
    def symmetric_activations(self) -> bool | None:
        """How what the quantized layers read is rounded, to 8 bits for each token; None: it is not."""
        groups = self._config.get("config_groups", {}).values()
        inputs = [group["input_activations"] for group in groups]
        return next((bool(found["symmetric"]) for found in inputs if found), None)

    def _ends(self, name: str) -> list[str]:
        return [end for end in (*WORDS, "weight", *COLUMNS) if f"{name}.{end}" in self._files]

    def _check(self, directory: Path) -> None:
        if self._method == "awq":
            found = self._config.get("bits"), str(self._config.get("version", "gemm")).lower()
            if found != (4, "gemm"):
                raise TaskError(
                    f"{directory} is AWQ with bits={found[0]}, version={found[1]}; "
                    "4 bits in GEMM layout can be loaded; quantize it again so"
                )
        elif self._method == "gptq" and self._config.get("desc_act"):
            raise TaskError(f"{directory} is GPTQ with desc_act=true; groups in their own order can be loaded")
        elif self._method not in (None, "compressed-tensors", "gptq"):
            raise TaskError(
                f"{directory} is quantized by {self._method!r}; compressed-tensors, awq and gptq can be loaded"
            )
