"""What a variant is called by how it was quantized: the one place that reads these keys of a summary's row.

A row of an earlier version's summary is told in today's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.old_words import new_record
from tasks.schemes import LLAMA_CPP


def made_as(row: Mapping[str, Any]) -> str:
    """The scheme of the variant of `row` and how its weights got there, as in `W8A8: SmoothQuant, GPTQ`; "baseline" for
    what was not quantized."""
    if not row.get("bits"):
        return "baseline"
    known = new_record(row)
    return ": ".join(filter(None, [known.get("scheme"), known.get("recipe")]))


def by_llama_cpp(row: Mapping[str, Any]) -> bool:
    """Whether llama.cpp's own quantizer made the variant of `row`."""
    return new_record(row).get("scheme") in LLAMA_CPP
