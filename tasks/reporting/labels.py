"""What a variant is called by how it was pressed: the one place that reads these keys of a summary's row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def recipe(row: Mapping[str, Any]) -> str:
    """How the variant of `row` was pressed, in a word: its method; "baseline" for what was not."""
    return str(row.get("method", "")) if row.get("bits") else "baseline"


def by_llama_cpp(row: Mapping[str, Any]) -> bool:
    """Whether llama.cpp's own quantizer made the variant of `row`."""
    return row.get("method") == "gguf"
