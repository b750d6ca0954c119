"""The methods that press a model, one module each, behind one small protocol.

A method's module is named after it (`variants.V.method` in params.yaml) and offers

    press(job: QuantizeJob) -> None

which writes a complete model directory (safetensors, config.json with its quantization_config) to
`job.destination`, an empty directory. It need not care for tokenizer and licence files, nor for whole-or-not-at-all:
tasks/quantize.py does.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from tasks.settings import BUILTIN, Variant

if TYPE_CHECKING:
    from torch import Tensor, dtype

BACKENDS = ("llm-compressor", "autoawq")  # the libraries that offer methods of ours as well


@dataclass(frozen=True)
class QuantizeJob:
    """One model to press.

    source: directory of the model, safetensors. tokens: int64 [samples, sequence_length], the calibration text.
    statistics: what the statistics stage left. device: "cpu" or "cuda". destination: an empty directory.
    share: (k, n) for every n-th decoder layer from the k-th on, of which the rest of the model is left to another
    process (parallel.py); None for all.
    """

    source: Path
    tokens: Tensor
    statistics: Path
    variant: Variant
    device: str
    destination: Path
    share: tuple[int, int] | None = None

    @property
    def dtype(self) -> dtype:
        """The precision that the model came in."""
        import torch

        config = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        return cast("dtype", getattr(torch, config["dtype"]))


class Quantizer(Protocol):
    """What a method's module offers."""

    def press(self, job: QuantizeJob) -> None:
        """Write the pressed model to `job.destination`."""


def quantizer(variant: Variant) -> Quantizer:
    """The module of the variant's method; one that we and a library offer is the one that `backend` says."""
    other = getattr(variant, "backend", BUILTIN) in BACKENDS
    return cast(Quantizer, importlib.import_module(f"tasks.quantizers.{'libraries.' if other else ''}{variant.method}"))
