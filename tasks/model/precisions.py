"""The record of a mixed precision, in a pressed model's directory: what was measured of each linear layer, and chosen.

precisions.json: by the layer's name, `chosen`, a precision as BITS@GROUP_SIZE, and `costs`, by precision: the
divergence of the model that it brings, nats a token (tasks/quantizers/sensitivity.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.output import write_json

FILE = "precisions.json"


def write_precisions(directory: Path, chosen: Mapping[str, str], costs: Mapping[str, Mapping[str, float]]) -> None:
    """Write the record. chosen, costs: by linear layer."""
    write_json(directory / FILE, {name: {"chosen": chosen[name], "costs": costs[name]} for name in chosen})


def read_precisions(directory: Path) -> list[dict[str, Any]]:
    """`name`, `chosen` and `costs` of each linear layer; nothing where precisions are not mixed."""
    path = directory / FILE
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [{"name": name, **of} for name, of in found.items()]
