"""Labels for the way a variant was quantized. Only this module reads these keys of a summary's row.

It translates the rows of earlier versions' summaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.old_words import new_record
from tasks.schemes import LLAMA_CPP


def made_as(row: Mapping[str, Any]) -> str:
    """Scheme and recipe of the variant in `row`, such as `W8A8: SmoothQuant, GPTQ`; "baseline" if it is not
    quantized."""
    if not row.get("bits"):
        return "baseline"
    known = new_record(row)
    return ": ".join(filter(None, [known.get("scheme"), known.get("recipe")]))


def by_llama_cpp(row: Mapping[str, Any]) -> bool:
    """Whether the variant in `row` was quantized by llama.cpp."""
    return new_record(row).get("scheme") in LLAMA_CPP
