"""A heat map of the layers that need precision: the cost of a layer's coarsest candidate, and the chosen one marked.

The template heat_map.svg.j2 draws it; all lengths are in its units.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.schemes import NONE, parse_precision

PLACE = re.compile(r"\.layers\.(\d+)\.(.+)$")
WHOLE = 32  # bits per weight of an unquantized layer, at most
MARKS = ("square", "dot", "triangle")  # of the precisions that are not the most frequent, from coarse to fine
CELL, ROW, TOP, LETTER = 24, 22, 6, 7.5


@dataclass(frozen=True)
class Cell:
    """A linear layer. strength: 0 to 1, of its cost on a logarithmic scale; None if it was not measured."""

    x: float
    y: float
    strength: float | None
    mark: str
    title: str


@dataclass(frozen=True)
class HeatMap:
    """kinds: row -> its y; layers: labelled columns -> their x; low, high: the costs at strength 0 and 1, in nats per
    token; chosen: for each kind, the layers at each of `precisions`; marks: of those that were chosen."""

    cells: Sequence[Cell]
    kinds: Mapping[str, float]
    layers: Mapping[int, float]
    width: float
    height: float
    low: float
    high: float
    precisions: Sequence[str]
    marks: Mapping[str, str]
    chosen: Mapping[str, Sequence[int]]


def heat_map(linears: Sequence[Mapping[str, Any]]) -> HeatMap | None:
    """Lay out a row for each kind of linear layer and a column for each decoder layer; None if no cost is known.

    linears: `name`, `chosen` and `costs` of each layer (tasks/model/precisions.py).
    """
    places = {(int(found[1]), found[2]): one for one in linears if (found := PLACE.search(one["name"]))}
    labels = sorted({label for one in places.values() for label in (*one["costs"], one["chosen"])}, key=_fineness)
    costs = {
        place: next((one["costs"][label] for label in labels if label in one["costs"]), None)
        for place, one in places.items()
    }
    known = [cost for cost in costs.values() if cost]
    if not known:
        return None
    low, high = min(known), max(known)
    kinds = _short(dict.fromkeys(kind for _, kind in places))
    y = {kind: TOP + ROW * row for row, kind in enumerate(kinds)}
    depth = 1 + max(layer for layer, _ in places)
    left = 12 + LETTER * max(map(len, kinds.values()))
    counts = Counter((kind, one["chosen"]) for (_, kind), one in places.items())
    often = Counter(one["chosen"] for one in places.values())
    others = [label for label in labels if label in often and label != often.most_common(1)[0][0]]
    marks = {label: MARKS[min(i, len(MARKS) - 1)] for i, label in enumerate(others)}
    cells = [
        Cell(
            left + CELL * layer,
            y[kind],
            _strength(costs[layer, kind], low, high),
            marks.get(one["chosen"], ""),
            f"layer {layer}, {kinds[kind]}: {name(one['chosen'])}; "
            + ", ".join(f"{name(label)} costs {one['costs'][label]:.2g}" for label in labels if label in one["costs"]),
        )
        for (layer, kind), one in places.items()
    ]
    step = max(1, math.ceil(depth / 15))
    return HeatMap(
        cells=cells,
        kinds={label: y[kind] for kind, label in kinds.items()},
        layers={layer: left + CELL * layer for layer in range(0, depth, step)},
        width=left + CELL * depth,
        height=TOP + ROW * len(kinds),
        low=low,
        high=high,
        precisions=[name(label) for label in labels],
        marks={name(label): marks.get(label, "") for label in labels if label in often},
        chosen={kinds[kind]: [counts[kind, label] for label in labels] for kind in kinds},
    )


def name(label: str) -> str:
    """W4A16_ASYM@64 -> W4A16_ASYM, groups of 64."""
    return "not quantized" if label == NONE else label.replace("@", ", groups of ")


def _fineness(label: str) -> tuple[int, float, str]:
    """Sort key, from the coarsest precision to the finest: W4A16_ASYM@128, W4A16_ASYM@64, W8A8, none."""
    scheme = parse_precision(label)
    if scheme is None:
        return WHOLE, 0, label
    return scheme.bits, -(scheme.group_size or math.inf), label


def _strength(cost: float | None, low: float, high: float) -> float | None:
    if cost is None or low == high:
        return cost and 1.0
    return round(math.log(max(cost, low) / low) / math.log(high / low), 3)


def _short(kinds: Iterable[str]) -> dict[str, str]:
    """Each kind's last name, or all of it where several share the last."""
    last = {kind: kind.rpartition(".")[2] for kind in kinds}
    often = Counter(last.values())
    return {kind: short if often[short] == 1 else kind for kind, short in last.items()}
