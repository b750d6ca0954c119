"""Several targets side by side: a row for each figure that decides, a column for each target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.reporting.columns import Cell, Column
from tasks.reporting.decision import figures, shown_variant
from tasks.reporting.number_format import figure

Values = Mapping[str, Any]


def overview(summaries: Mapping[str, Values]) -> list[Column]:
    """The figures of each target's winner, or of the variant that comes closest. summaries: by target."""
    found = {target: _decided(summary) for target, summary in summaries.items()}
    rows = list(dict.fromkeys(label for cells in found.values() for label in cells))
    names = Column("", {row: Cell(row) for row in rows}, "name")
    return [names, *(Column(target, {row: cells.get(row, Cell()) for row in rows}) for target, cells in found.items())]


def fastest(summaries: Mapping[str, Values]) -> str:
    """Which target is the fastest under load on this machine, as a sentence; empty unless at least two were loaded."""
    speeds = {}
    for target, summary in summaries.items():
        row = summary["variants"].get(shown_variant(summary)) or {}
        if (row.get("load") or {}).get("main"):
            main = row["load"]["main"]
            speeds[target] = (
                main["tokens_per_second"],
                main["concurrency"],
                (row.get("speed") or {}).get("runtime") or {},
            )
    if len(speeds) < 2 or len({at_once for _, at_once, _ in speeds.values()}) > 1:
        return ""
    order = sorted(speeds, key=lambda target: -speeds[target][0])
    written = ", ".join(f"{target} {figure(speeds[target][0], 1)}" for target in order)
    _, at_once, runtime = speeds[order[0]]
    where = runtime.get("processor") or "this machine"
    return f"On {where}, with {at_once} requests at once, {order[0]} is the fastest (tokens per second: {written})."


def _decided(summary: Values) -> dict[str, Cell]:
    name = shown_variant(summary)
    verdict = (summary["variants"].get(name) or {}).get("verdict") or ""
    winner = Cell(summary["winner"] or "none", "" if summary["winner"] else f"closest: {name}, {verdict}")
    return {"winner": winner} | {one.label: Cell(one.value, one.detail) for one in figures(summary)}
