"""The table on the terminal: plain text, at most 120 columns, readable without colour."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tasks.reporting.number_format import change, figure, interval, megabytes, percent, short_percent, times, words

WIDTH = 120
COLUMNS_FOR_TEXTS = 2  # more texts than this share one column
VERDICTS = {"pass": "PASS", "fail": "FAIL", "inconclusive": "inconclusive", None: "baseline"}


def table(summary: Mapping[str, Any]) -> str:
    """The table of the field, the reason for each verdict, the winner and what the numbers rest on."""
    screen = io.StringIO()
    console = Console(file=screen, width=WIDTH, color_system=None, force_terminal=False, highlight=False, emoji=False)
    console.print(_table(summary))
    for variant, row in summary["variants"].items():
        if row["verdict"]:
            console.print(f"{variant}: {row['verdict']}: {row['reason']}.", markup=False)
    console.print(winner_line(summary), markup=False)
    console.print()
    for line in (method_line(summary), contract_line(summary), *summary["notes"]):
        console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in screen.getvalue().splitlines()) + "\n"


def winner_line(summary: Mapping[str, Any]) -> str:
    """Which variant is packaged and why, or that none is."""
    name = summary["winner"]
    if name is None:
        return "No variant passes its gate: nothing will be packaged."
    row = summary["variants"][name]
    size = f"{megabytes(row['size_bytes'])}, {times(row['ratio'])} smaller than the baseline"
    return f"Winner: {name}, the smallest that passes ({size})."


def method_line(summary: Mapping[str, Any]) -> str:
    """What the columns mean."""
    confidence = short_percent(summary["gate"]["confidence"])
    return (
        "Retention: mean over the tasks of score / baseline's score, with a paired-bootstrap interval over "
        f"the items ({confidence}, {summary['gate']['resamples']:,} resamples). KL: divergence from the "
        "baseline in nats a token; same top 1: tokens predicted alike; both averaged over the texts."
    )


def contract_line(summary: Mapping[str, Any]) -> str:
    """The evaluation contract, which is the same for all variants."""
    fields = "; ".join(f"{field}: {words(value)}" for field, value in summary["contract"].items())
    return f"Contract {summary['contract_hash'][:12]}: {fields}."


def speed(row: Mapping[str, Any]) -> str:
    """Decode speed against the baseline's, or that this runtime has no fast kernel for the format."""
    if not row["speed"]["fast_kernel"]:
        return "no fast kernel"
    return times(row["speed"]["decode_ratio"])


def _table(summary: Mapping[str, Any]) -> Table:
    rows = summary["variants"]
    texts = list(rows[summary["baseline"]]["texts"])
    apart = len(texts) <= COLUMNS_FOR_TEXTS
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    grid.add_column("variant", overflow="fold")
    for head in ("size", "ratio"):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column("decode\nspeed", justify="right", max_width=7)
    grid.add_column(f"retention in %\n({short_percent(summary['gate']['confidence'])} interval)", no_wrap=True)
    for text in texts if apart else ["change"]:
        grid.add_column(f"perplexity\n{text}", justify="right", overflow="fold")
    grid.add_column("KL", justify="right", no_wrap=True)
    grid.add_column("same\ntop 1", justify="right", no_wrap=True)
    grid.add_column("verdict", no_wrap=True)
    for variant, row in rows.items():
        base = variant == summary["baseline"]
        if apart:
            perplexities = [
                figure(t["perplexity"]) + ("" if base else f" {change(t['perplexity_change']):>6}")
                for t in row["texts"].values()
            ]
        else:
            perplexities = ["\n".join(f"{t} {change(v['perplexity_change'])}" for t, v in row["texts"].items())]
        kept = row["retention"]
        grid.add_row(
            variant,
            megabytes(row["size_bytes"]),
            times(row["ratio"]),
            speed(row),
            f"{100 * kept['mean']:5.1f}  ({interval(kept)})" if kept else "100.0",
            *perplexities,
            "" if base else figure(row["kl"], 3),
            "" if base else percent(row["top1"]),
            VERDICTS[row["verdict"]],
        )
    return grid
