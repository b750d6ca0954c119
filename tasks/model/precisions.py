"""The record of mixed precision in a quantized model's directory: measured costs and choice for each linear layer.

precisions.json: by layer name, `chosen`, a precision as BITS@GROUP_SIZE, and `costs`: by precision, the model's
divergence, in nats per token (tasks/quantizers/sensitivity.py).
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
    """`name`, `chosen` and `costs` of each linear layer; empty without mixed precision."""
    path = directory / FILE
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [{"name": name, **of} for name, of in found.items()]
