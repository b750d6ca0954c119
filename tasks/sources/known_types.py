"""What a trial of every type of model found, to refuse a type by its config.json alone.

`make models` writes known_types.json with docs/models.md, from the same trial. It counts for the version of
Transformers that it was made with; other types and versions are proven on the model itself, in the stage statistics.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class KnownType:
    """A model_type. refused: why it cannot be pressed, None if it can; engines: that read it when it is pressed;
    tried: the engines that were tried, with their versions."""

    refused: str | None
    engines: tuple[str, ...]
    tried: str


def known_type(kind: str) -> KnownType | None:
    """What is known of a model_type with the installed Transformers; None if it was not tried with it."""
    found = _read()
    one = found["types"].get(kind)
    if one is None or found["transformers"] != version("transformers"):
        return None
    if one.get("needs") and find_spec(one["needs"]):  # the trial lacked this library
        return None
    tried = f"Transformers {found['transformers']}, vLLM {found['vllm']}"
    return KnownType(one["refused"], tuple(one["engines"]), tried)


@lru_cache(maxsize=1)
def _read() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))
