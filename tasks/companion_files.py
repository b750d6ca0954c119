"""The small files beside a model's weights: configuration, tokenizer, processor, templates, licences."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SMALL = (".json", ".txt", ".jinja", ".model", ".spm", ".tiktoken")
_LICENCE = re.compile(r"(licen[cs]e|notice|copying|use_policy)[^/]*", re.IGNORECASE)
# written by the stages about their own folder
_OURS = ("linears.json", "manifest.json", "places.json", "precisions.json", "provenance.json", "source.json")
_OF_THE_WEIGHTS = ("config.json", "model.safetensors.index.json")


def is_licence(name: str) -> bool:
    """Whether a file of this name contains licence terms."""
    return _LICENCE.fullmatch(name.rpartition("/")[2]) is not None


def small_files(names: Iterable[str]) -> list[str]:
    """The configuration, tokenizer, processor, template and licence files among `names`, top level only."""
    return sorted(
        n
        for n in names
        if "/" not in n and (n.lower().endswith(_SMALL) or is_licence(n)) and not n.startswith(".") and n not in _OURS
    )


def companion_files(names: Iterable[str]) -> list[str]:
    """Those that a model keeps when its weights are written anew."""
    return [name for name in small_files(names) if name not in _OF_THE_WEIGHTS]
