"""Where the weights of a quantized model's linear layers belong in the model it was made from.

Most are stored as NAME.weight there. Of the others, matrices of a stack and transposed ones, places.json keeps the
tensor that they were taken from, so that the dense model can be put together again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tasks.model.linears import Linear
from tasks.output import write_json

FILE = "places.json"


def write_places(directory: Path, places: Mapping[str, Linear]) -> None:
    """Write the places of linear layers, by full name; nothing if there are none."""
    if places:
        write_json(directory / FILE, {name: asdict(linear) for name, linear in places.items()})


def read_places(directory: Path) -> dict[str, Linear]:
    """Read what `write_places` wrote; empty if it wrote nothing."""
    path = directory / FILE
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: Linear.read(own) for name, own in found.items()}
