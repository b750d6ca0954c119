"""The small files beside a model's weights: configuration, tokenizer, templates, licences."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SMALL = (".json", ".txt", ".jinja", ".model", ".tiktoken")
_LICENCE = re.compile(r"(licen[cs]e|notice|copying|use_policy)[^/]*", re.IGNORECASE)


def is_licence(name: str) -> bool:
    """Whether a file of this name contains licence terms."""
    return _LICENCE.fullmatch(name.rpartition("/")[2]) is not None


def small_files(names: Iterable[str]) -> list[str]:
    """The configuration, tokenizer, template and licence files among `names`, top level only."""
    return sorted(
        n for n in names if "/" not in n and (n.lower().endswith(_SMALL) or is_licence(n)) and not n.startswith(".")
    )
