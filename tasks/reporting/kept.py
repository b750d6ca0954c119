"""What a bundle keeps of its source, byte for byte: tensors outside the decoder's layers, and processor files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tasks.model.announced import announced
from tasks.output import sha256
from tasks.tensor_files import Entry, TensorFiles

_PROCESSOR = re.compile(r"(pre)?processor_config|image|video|audio|feature_extractor", re.IGNORECASE)


@dataclass
class Group:
    """Tensors whose names start alike: their number and their bytes."""

    tensors: int = 0
    bytes: int = 0

    def add(self, entry: Entry) -> None:
        """Count one."""
        self.tensors += 1
        self.bytes += entry.bytes


@dataclass
class Kept:
    """unchanged: the tensors outside the decoder's layers that are the source's, bit for bit, by the start of their
    names (`prefix_of`); changed: the others that the bundle has under the same name, in another dtype or with other
    numbers; quantized: those that it does not have under that name; files: of the processor, the same as the
    source's."""

    unchanged: dict[str, Group] = field(default_factory=dict)
    changed: dict[str, Group] = field(default_factory=dict)
    quantized: dict[str, Group] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For provenance.json."""
        return asdict(self)


def kept(bundle: Path, source: Path) -> Kept | None:
    """Compare a bundle with the model folder that it was made from, one tensor in memory at a time.

    None if the bundle holds no safetensors, as for the targets onnx and gguf.
    """
    if not any(bundle.glob("*.safetensors")):
        return None
    ours, theirs = TensorFiles(bundle), TensorFiles(source)
    layers = [layer.prefix for layer in announced(source).layers]
    files = processor_files(path.name for path in source.iterdir())
    found = Kept(files=[name for name in files if _same(name, bundle, source)])
    for name in theirs:
        if name.startswith(tuple(layers)):
            continue
        if name not in ours:
            groups = found.quantized
        else:
            groups = found.unchanged if _equal(name, ours, theirs) else found.changed
        groups.setdefault(prefix_of(name, layers), Group()).add(theirs.entry(name))
    return found


def prefix_of(name: str, layers: Iterable[str] = ()) -> str:
    """The first two parts of a tensor's name, without its last; beside the decoder's layers (a layer that predicts
    further tokens), with the layer's number."""
    for layer in layers:
        beside = layer.rstrip(".").rpartition(".")[0] + "."
        if name.startswith(beside):
            return beside + name.removeprefix(beside).partition(".")[0]
    parts = name.split(".")
    return ".".join(parts[: max(1, min(2, len(parts) - 1))])


def processor_files(names: Iterable[str]) -> list[str]:
    """The files among `names` that say how images, videos and sounds become a model's input."""
    return sorted(name for name in names if name.endswith(".json") and _PROCESSOR.search(name))


def _equal(name: str, ours: TensorFiles, theirs: TensorFiles) -> bool:
    import torch

    if ours.entry(name) != theirs.entry(name):
        return False
    mine, other = (files.read(name).contiguous().reshape(-1).view(torch.uint8) for files in (ours, theirs))
    return torch.equal(mine, other)


def _same(name: str, bundle: Path, source: Path) -> bool:
    return (bundle / name).is_file() and sha256(bundle / name) == sha256(source / name)
