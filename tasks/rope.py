"""A config.json's rotary position embedding and its longest context, by the names of any version of Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by Transformers 5's names: `rope_type`, `rope_theta` and those of the type.

    Version 4 had `rope_theta` beside `rope_scaling`, whose type was once called `type`.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = found.get("rope_theta", config.get("rope_theta", 10000.0))
    return {**found, "rope_type": found.get("rope_type", found.get("type", "default")), "rope_theta": theta}


def longest_context(config: Mapping[str, Any]) -> int | None:
    """The most tokens in a row that the model was made for; None if its config.json names no limit."""
    config = config.get("text_config") or config
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
    longest: int | None = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    if not longest:
        return None
    rope = rope_parameters(config)
    if rope["rope_type"] in ("linear", "dynamic", "yarn"):  # these extend it
        longest = max(longest, int(rope.get("original_max_position_embeddings", longest) * rope.get("factor", 1)))
    return longest
