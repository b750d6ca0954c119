"""Greedy texts that part: a near-tie, which rounding decides, or a difference.

Two runs of a model round differently: with another kernel, number of rows, or dtype. Where the two most likely tokens
are almost equally likely, either may come first, and from there on the texts have nothing in common. So texts are
compared up to the first place where they part, and this place must be a near-tie.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bounds, nats, by what the served engine computes in, against an evaluation in float32; docs/serving.md has the
# measurements. GAPS: the difference between the log-probabilities of the two best tokens up to which rounding can
# decide, about twice the largest change of it that was seen. MEANS: by which the mean log-probability of 4,000 given
# tokens may differ, four to five of its standard errors.
INTEGER_KERNELS = "integer kernels"  # of ONNX Runtime: activations rounded block by block, in the evaluation too
GAPS = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.6, INTEGER_KERNELS: 0.5, "rounded activations": 1.0}
MEANS = {"float32": 0.0005, "float16": 0.0005, "bfloat16": 0.005, INTEGER_KERNELS: 0.001, "rounded activations": 0.008}
COARSE = "bfloat16"  # for a dtype that is not listed


@dataclass(frozen=True)
class Parting:
    """The first place where a text differs from its reference. near_tie: whether rounding explains it.

    gap: between the log-probabilities of the reference's two best tokens there, nats; None if one text is only shorter.
    """

    place: int
    gap: float | None
    near_tie: bool

    def __str__(self) -> str:
        gap = "one text ends there" if self.gap is None else f"the two best tokens differ by {self.gap:.3f} nats"
        return f"token {self.place + 1}: {gap}"


def parting(
    tokens: Sequence[Hashable],
    best: Sequence[Sequence[tuple[Hashable, float]]],
    other: Sequence[Hashable],
    bound: float,
) -> Parting | None:
    """Where `other` parts from `tokens`; None if they are equal. Tokens are ids or texts.

    best: the most likely tokens of each place of `tokens` with their log-probabilities, best first. It is a near-tie if
    both tokens are among them and less than `bound` below the first.
    """
    for place, (one, two) in enumerate(zip(tokens, other, strict=False)):
        if one != two:
            likely = dict(best[place]) if place < len(best) else {}
            top = max(likely.values(), default=0.0)
            below = [top - likely[token] if token in likely else float("inf") for token in (one, two)]
            values = sorted(likely.values(), reverse=True)
            gap = values[0] - values[1] if len(values) > 1 else None
            return Parting(place, gap, max(below) < bound)
    if len(tokens) == len(other):
        return None
    return Parting(min(len(tokens), len(other)), None, False)


def computed_in(folder: Path, dtype: str = "auto") -> str:
    """What a served model computes in: a dtype, or "rounded activations" where its activations are quantized too."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if any(_inputs(config.get("quantization_config") or {})):
        return "rounded activations"
    if dtype != "auto":
        return dtype
    text = config.get("text_config") or {}
    named = (part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype"))
    return next((str(one) for one in named if one), COARSE)


def _inputs(stored: Mapping[str, Any]) -> list[Any]:
    """The quantized activations of a compressed-tensors model."""
    groups = (stored.get("config_groups") or {}).values()
    return [group["input_activations"] for group in groups if group.get("input_activations")]
