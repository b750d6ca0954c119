"""The linear layers of a model, from its safetensors headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from tasks.errors import TaskError


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """(rows, width) of every linear layer inside the decoder layers, by name, from the file headers only."""
    shapes = {}
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            head = json.loads(stream.read(length))
        for name, tensor in head.items():
            if ".layers." in name and name.endswith(".weight") and len(tensor["shape"]) == 2:
                shapes[name.removesuffix(".weight")] = (tensor["shape"][0], tensor["shape"][1])
    if not shapes:
        raise TaskError(f"{model} holds no decoder layers in safetensors files; run the download stage")
    return shapes
