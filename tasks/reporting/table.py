"""The table on the terminal: plain text, at most 120 columns, readable without colour."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tasks.reporting.columns import Column, columns, legend, reasons
from tasks.reporting.decision import next_step, winner_line
from tasks.reporting.overview import fastest, overview

WIDTH = 120
MOST_TEXTS = 2  # more texts than this share one column


def tables(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of each target; with several, after the overview of all. summaries: by target."""
    if len(summaries) == 1:
        return "".join(table(summary) for summary in summaries.values())
    screen, console = _screen()
    console.print(grid(overview(summaries)))
    if line := fastest(summaries):
        console.print(f"\n{line}", markup=False)
    parts = [_text(screen), *(f"{target}\n{'-' * len(target)}\n{table(one)}" for target, one in summaries.items())]
    return "\n".join(parts)


def table(summary: Mapping[str, Any]) -> str:
    """The table of all variants, with the reason for each verdict, the winner, the legend and the notes."""
    screen, console = _screen()
    console.print(grid(columns(summary, MOST_TEXTS)))
    for variant, reason in reasons(summary).items():
        console.print(f"{variant}: {reason}", markup=False)
    console.print(winner_line(summary), markup=False)
    console.print(next_step(summary), markup=False)
    console.print()
    for line in (legend(summary), *summary["notes"]):
        console.print(line, markup=False)
    return _text(screen)


def _screen() -> tuple[io.StringIO, Console]:
    screen = io.StringIO()
    plain = Console(file=screen, width=WIDTH, color_system=None, force_terminal=False, highlight=False, emoji=False)
    return screen, plain


def _text(screen: io.StringIO) -> str:
    return "\n".join(line.rstrip() for line in screen.getvalue().splitlines()) + "\n"


def grid(described: Sequence[Column]) -> Table:
    """The columns as a rich table, without remarks."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in described:
        shown.add_column(column.heading, justify="right" if column.kind == "figure" else "left", overflow="fold")
    for name in described[0].cells:
        shown.add_row(*(str(column.cells[name]) for column in described))
    return shown
