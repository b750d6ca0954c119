"""A config.json's rotary position embedding, by the names of any version of Transformers."""

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
