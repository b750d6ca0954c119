"""The benchmark's figures as rows and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tasks.reporting.columns import Cell, Column
from tasks.reporting.number_format import change, figure, megabytes, percent
from tasks.reporting.table import grid


@dataclass(frozen=True)
class Row:
    """One contender. seconds: median time to quantize; shared: seconds of the pass that our contenders share, 0 for
    others.

    bits_per_weight: with scales and zero points. perplexity: by text, and its change from the baseline. kl: nats per
    token, mean over the texts. retention: share of the baseline's mean score over the tasks; None: not measured.
    """

    name: str
    variant: str
    seconds: float
    shared: float
    peak_memory_bytes: int
    bits_per_weight: float
    perplexity: Mapping[str, float]
    change: Mapping[str, float]
    kl: float
    retention: float | None
    own: bool


def rows(found: Mapping[str, Any]) -> list[Row]:
    """The contenders of a result, in order."""
    baseline = found["quality"]["base"]
    base = {text: score["perplexity"] for text, score in baseline["texts"].items()}
    made = []
    for name, variant in found["variants"].items():
        quality = found["quality"][name]
        scores = quality["texts"]
        made.append(
            Row(
                name=name,
                variant=variant,
                seconds=found["seconds"][name],
                shared=found["seconds"]["statistics"] if name in found["own"] else 0.0,
                peak_memory_bytes=found["peak_memory_bytes"][name],
                bits_per_weight=quality["bits_per_weight"],
                perplexity={text: score["perplexity"] for text, score in scores.items()},
                change={text: score["perplexity"] / base[text] - 1 for text, score in scores.items()},
                kl=sum(score["kl"] for score in scores.values()) / len(scores),
                retention=quality["score"] and quality["score"] / baseline["score"],
                own=name in found["own"],
            )
        )
    return made


def table(field: Sequence[Row]) -> Table:
    """The table for the terminal."""

    def column(heading: str, text: Callable[[Row], str], detail: Callable[[Row], str] = lambda row: "") -> Column:
        return Column(heading, {row.name: Cell(text(row), detail(row)) for row in field})

    def perplexity(text: str) -> Column:
        return column(
            f"perplexity,\n{text}", lambda row: figure(row.perplexity[text]), lambda row: change(row.change[text])
        )

    return grid(
        [
            Column("contender", {row.name: Cell(row.name) for row in field}, "name"),
            column("seconds", lambda row: figure(row.seconds, 1)),
            column("with\nthe pass", lambda row: figure(row.seconds + row.shared, 1) if row.shared else ""),
            column("peak\nmemory", lambda row: megabytes(row.peak_memory_bytes)),
            column("bits per\nweight", lambda row: figure(row.bits_per_weight)),
            *(perplexity(text) for text in field[0].perplexity),
            column("KL", lambda row: figure(row.kl, 3)),
            column("retention", lambda row: "" if row.retention is None else percent(row.retention)),
        ]
    )
