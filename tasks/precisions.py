"""The record of a mixed precision, in a pressed model's directory: what was measured of each linear layer, and chosen.

precisions.json: by the layer's name, `chosen`, a precision as BITS@GROUP_SIZE, and `errors`, by precision: of the
layer's output, squared, as a share of the output, from the Gram matrix of its inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.output import write_json

FILE = "precisions.json"


def write_precisions(directory: Path, chosen: Mapping[str, str], errors: Mapping[str, Mapping[str, float]]) -> None:
    """Write the record. chosen, errors: by linear layer."""
    write_json(directory / FILE, {name: {"chosen": chosen[name], "errors": errors[name]} for name in chosen})


def read_precisions(directory: Path) -> list[dict[str, Any]]:
    """`name`, `chosen` and `errors` of each linear layer; nothing where precisions are not mixed."""
    path = directory / FILE
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [{"name": name, **of} for name, of in found.items()]
