"""The contenders: settings from params.yaml, with the changes that make them comparable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.settings import BUILTIN


@dataclass(frozen=True)
class Contender:
    """One way to make a variant. variant: its name in params.yaml; changes: to its settings. published: use autoawq's
    own search instead of our subclass of it."""

    name: str
    variant: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    published: bool = False

    @property
    def own(self) -> bool:
        """Whether it uses our quantizer and the shared statistics."""
        return bool(self.changes.get("backend", BUILTIN) == BUILTIN)


_COMPRESSOR = {"backend": "llm-compressor"}
_PLAIN = {"rounding": "nearest", "refine": 0, "format": "awq"}  # autoawq supports nothing else
_AUTOAWQ = {"backend": "autoawq", **_PLAIN}

CONTENDERS = (
    Contender("int8, modelpress", "int8", {"rounding": "nearest"}),
    Contender("int8, modelpress, as in params.yaml", "int8"),
    Contender("int8, llm-compressor", "int8", {**_COMPRESSOR, "rounding": "nearest"}),
    Contender("gptq, modelpress", "gptq-int4", {"clip": False, "refine": 0}),
    Contender("gptq, modelpress, as in params.yaml", "gptq-int4"),
    Contender("gptq, modelpress, propagated", "gptq-int4", {"propagate": True}),
    Contender("gptq, llm-compressor", "gptq-int4", {**_COMPRESSOR, "clip": False, "refine": 0}),
    Contender("awq, modelpress", "awq-int4", _PLAIN),
    Contender("awq, modelpress, as in params.yaml", "awq-int4"),
    Contender("awq, autoawq, mended", "awq-int4", _AUTOAWQ),
    Contender("awq, autoawq, as published", "awq-int4", _AUTOAWQ, published=True),
    Contender("auto, modelpress", "auto"),
)
# for decoding as in a server, with an 8-bit output layer
DECODING = {"output_layer": "W8A16@64"}
