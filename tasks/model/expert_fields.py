"""The fields of configurations that say how many experts a mixture has; a model has some of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
VISITED = (  # how many of them a token visits
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
)


def present(config: Any, names: Iterable[str]) -> list[str]:
    """Those fields that the configuration has, with a number above 0."""
    values = {name: getattr(config, name, None) for name in names}
    return [name for name, value in values.items() if isinstance(value, int) and value > 0]
