"""The result of a run as Markdown for Prefect's UI, from summary.json: verdict, figures, table, first texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from tasks.reporting.columns import columns, one_line, reasons
from tasks.reporting.completions import markdown
from tasks.reporting.decision import figures, headline, next_step, winner_line

MOST_PROMPTS = 3


def result(summary: Mapping[str, Any], plot: str) -> str:
    """The verdict and its figures, table, reasons, the given `plot`, notes, the first greedy texts and the contract's
    hash; missing parts are left out."""
    decided = "\n".join(f"- {one.label}: **{one.value}** ({one.detail})" for one in figures(summary))
    because = "\n".join(f"- **{name}**: {reason}" for name, reason in reasons(summary).items())
    parts = [f"# {headline(summary)}", f"**{winner_line(summary)}**", decided, next_step(summary)]
    parts += [_table(summary), because, plot, *summary.get("notes", [])]
    if texts := markdown(summary, MOST_PROMPTS):
        parts += ["## The same prompts, continued", texts]
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
