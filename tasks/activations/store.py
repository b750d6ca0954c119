"""Read the statistics stage's files: statistics of the layers' inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import TaskError
from tasks.tensor_files import OUTPUT

if TYPE_CHECKING:
    from torch import Tensor

READERS = "readers"  # metadata key: the linear layers that read each input
FEW = "few"  # metadata key: the tokens of experts that saw too few


@dataclass(frozen=True)
class Input:
    """Statistics of a linear layer's inputs X over all calibration tokens.

    gram: X^T X, float32 [channels, channels], with token weights if configured. largest, mean: of the magnitudes,
    float32 [channels].
    """

    gram: Tensor
    largest: Tensor
    mean: Tensor


def statistics_file(directory: Path, layer: int | None) -> Path:
    """The statistics file of decoder layer `layer`; None: the output layer."""
    return directory / (f"{OUTPUT}.safetensors" if layer is None else f"layers.{layer}.safetensors")


def load_statistics(directory: Path, layer: int | None, device: str) -> dict[str, Input]:
    """Load the statistics of each linear layer in decoder layer `layer`, by name; layers with the same input share an
    object. layer: None for the output layer, `OUTPUT`. TaskError if there are none."""
    from safetensors import safe_open

    path = statistics_file(directory, layer)
    if not path.is_file():
        raise TaskError(f"{path} not found; run the statistics stage first: modelpress run")
    found: dict[str, Input] = {}
    with safe_open(path, framework="pt", device=device) as file:
        for first, readers in json.loads(file.metadata()[READERS]).items():
            known = Input(*(file.get_tensor(f"{first}.{key}") for key in ("gram", "largest", "mean")))
            found |= dict.fromkeys(readers, known)
    return found


def load_few(directory: Path, layer: int) -> dict[str, int]:
    """The tokens of the experts in decoder layer `layer` that saw too few for statistics of their own, by name."""
    from safetensors import safe_open

    path = statistics_file(directory, layer)
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        found: dict[str, int] = json.loads(file.metadata().get(FEW, "{}"))
    return found
