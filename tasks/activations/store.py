"""The statistics stage's files.

`layers.N.safetensors`, for each decoder layer, holds for each distinct input (q, k and v share one) the Gram matrix and
the largest and mean magnitude by channel; `lm_head.safetensors` the output layer's; `importance.N.safetensors` the
weights of the tokens, where they are weighed. Of a model whose Gram matrices are too large for the disk, the layers'
files are without them, and `hidden.N.safetensors` has what each layer reads, `tokens.safetensors` the text (inputs.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import TaskError
from tasks.output import write_text
from tasks.tensor_files import OUTPUT, save

if TYPE_CHECKING:
    import torch
    from torch import Tensor

READERS = "readers"  # metadata key: the linear layers that read each input
FEW = "few"  # metadata key: the tokens of experts that saw too few
ROWS = "rows"  # in hidden.N.safetensors: [sequences, length, channels]
TEXT = "tokens.safetensors"
PRODUCTS = "products"  # metadata key of the text: dtype of the pass's matrix products
IDENTITY = "identity.txt"


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


def hidden_file(directory: Path, layer: int) -> Path:
    """The file with what decoder layer `layer` reads."""
    return directory / f"hidden.{layer}.safetensors"


def importance_file(directory: Path, layer: int) -> Path:
    """The file with the weights of the tokens in decoder layer `layer`."""
    return directory / f"importance.{layer}.safetensors"


def load_statistics(directory: Path, layer: int | None, device: str) -> dict[str, Input]:
    """Load the statistics of each linear layer in decoder layer `layer`, by name; layers with the same input share an
    object. layer: None for the output layer, `OUTPUT`. TaskError if there are none."""
    found: dict[str, Input] = {}
    for first, readers in load_readers(directory, layer).items():
        found |= dict.fromkeys(readers, read_input(directory, layer, first, device))
    return found


def load_readers(directory: Path, layer: int | None) -> dict[str, list[str]]:
    """The linear layers that read each input, by the first of them. TaskError if there are no statistics."""
    return dict(json.loads(_metadata(directory, layer)[READERS]))


def load_few(directory: Path, layer: int) -> dict[str, int]:
    """The tokens of the experts in decoder layer `layer` that saw too few for statistics of their own, by name."""
    if not statistics_file(directory, layer).exists():  # no text passes through it
        return {}
    return dict(json.loads(_metadata(directory, layer).get(FEW, "{}")))


def read_input(directory: Path, layer: int | None, first: str, device: str) -> Input:
    """The statistics of one input, by its first reader."""
    return Input(*_read(directory, layer, first, ("gram", "largest", "mean"), device))


def read_magnitudes(directory: Path, layer: int | None, first: str, device: str) -> tuple[Tensor, Tensor]:
    """The largest and the mean magnitude of one input, by its first reader."""
    largest, mean = _read(directory, layer, first, ("largest", "mean"), device)
    return largest, mean


def sums_again(directory: Path) -> bool:
    """Whether the Gram matrices are to be summed again from what the layers read."""
    return (directory / TEXT).exists()


def save_text(tokens: Tensor, directory: Path, products: torch.dtype) -> None:
    """Keep the text whose sums are to be made again. products: dtype of the pass's matrix products."""
    save({ROWS: tokens}, directory / TEXT, {PRODUCTS: str(products).removeprefix("torch.")})


def load_text(directory: Path) -> tuple[Tensor, torch.dtype]:
    """What `save_text` kept."""
    import torch
    from safetensors import safe_open

    with safe_open(directory / TEXT, framework="pt") as file:
        found: torch.dtype = getattr(torch, file.metadata()[PRODUCTS])
        return file.get_tensor(ROWS), found


def write_identity(directory: Path, layers: int) -> None:
    """Write a hash over what the Gram matrices are made of: the same, whether they are kept or summed again."""
    from tasks.model.structure import FILE  # takes seconds to import

    digest = hashlib.sha256((directory / FILE).read_bytes())
    for layer in [*range(layers), None]:
        if statistics_file(directory, layer).exists():
            _add_tensors(digest, statistics_file(directory, layer), ".gram")
        if layer is not None and importance_file(directory, layer).exists():
            _add_tensors(digest, importance_file(directory, layer), None)
    write_text(directory / IDENTITY, digest.hexdigest() + "\n")


def _add_tensors(digest: Any, path: Path, but: str | None) -> None:
    """Hash a file's metadata and its tensors, in order of their names, but those whose names end in `but`."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        digest.update(json.dumps([path.name, file.metadata()], sort_keys=True).encode())
        for name in sorted(file.keys()):
            if but is None or not name.endswith(but):
                digest.update(name.encode())
                digest.update(file.get_tensor(name).numpy().tobytes())


def _read(directory: Path, layer: int | None, first: str, keys: tuple[str, ...], device: str) -> list[Tensor]:
    from safetensors import safe_open

    with safe_open(statistics_file(directory, layer), framework="pt", device=device) as file:
        return [file.get_tensor(f"{first}.{key}") for key in keys]


def _metadata(directory: Path, layer: int | None) -> dict[str, str]:
    from safetensors import safe_open

    path = statistics_file(directory, layer)
    if not path.is_file():
        raise TaskError(f"{path} not found; run the statistics stage first: modelpress run")
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata() or {}
    return found
