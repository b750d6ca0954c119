"""The result of a run as Markdown for Prefect's UI, from summary.json: table, verdicts, winner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from tasks.reporting.columns import columns, one_line, reasons, winner_line


def result(summary: Mapping[str, Any], plot: str) -> str:
    """Table, reasons, winner, the given `plot`, notes and the contract's hash; missing parts are left out."""
    because = "\n".join(f"- **{name}**: {reason}" for name, reason in reasons(summary).items())
    parts = [_table(summary), because, f"**{winner_line(summary)}**", plot, *summary.get("notes", [])]
    if contract := summary.get("contract_hash"):
        parts.append(f"Evaluation contract `{contract}`; details in report/index.html.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(summary: Mapping[str, Any]) -> str:
    described = columns(summary)
    text: str = tabulate(
        {one_line(column.heading): [one_line(cell) for cell in column.cells.values()] for column in described},
        headers="keys",
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["right" if column.kind == "figure" else "left" for column in described],
    )
    return text
