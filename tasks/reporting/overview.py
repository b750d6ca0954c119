"""Several targets side by side: a row for each figure that decides, a column for each target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.reporting.columns import Cell, Column
from tasks.reporting.decision import figures, shown_variant

Values = Mapping[str, Any]


def overview(summaries: Mapping[str, Values]) -> list[Column]:
    """The figures of each target's winner, or of the variant that comes closest. summaries: by target."""
    found = {target: _decided(summary) for target, summary in summaries.items()}
    rows = list(dict.fromkeys(label for cells in found.values() for label in cells))
    names = Column("", {row: Cell(row) for row in rows}, "name")
    return [names, *(Column(target, {row: cells.get(row, Cell()) for row in rows}) for target, cells in found.items())]


def _decided(summary: Values) -> dict[str, Cell]:
    name = shown_variant(summary)
    verdict = (summary["variants"].get(name) or {}).get("verdict") or ""
    winner = Cell(summary["winner"] or "none", "" if summary["winner"] else f"closest: {name}, {verdict}")
    return {"winner": winner} | {one.label: Cell(one.value, one.detail) for one in figures(summary)}
