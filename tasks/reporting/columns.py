"""The result table, described once: what each column says of each variant, and the sentences that go with it.

The terminal (tasks/reporting/table.py), the HTML page and Prefect's pages (flows/tracking/) only lay it out. A summary
may come from a report stage of the user's own: what it leaves out is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks.reporting.labels import made_as
from tasks.reporting.number_format import change, figure, interval, megabytes, percent, short_percent, times

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """`text`, and `detail` that belongs to it (an interval, a change); `remark` where there is room for one."""

    text: str = ""
    detail: str = ""
    remark: str = ""

    def __str__(self) -> str:
        """The cell without its remark."""
        return f"{self.text} ({self.detail})" if self.text and self.detail else self.text or self.detail


@dataclass(frozen=True)
class Column:
    """One column: a heading, and a cell for each row by its name. Both may have line breaks."""

    heading: str
    cells: Mapping[str, Cell]
    kind: Literal["name", "figure", "verdict"] = "figure"


def columns(summary: Values, most_texts: int | None = None) -> list[Column]:
    """The columns of the table, each with the variants in the summary's order.

    With more texts than `most_texts` they share one column, of the changes alone.
    """
    rows: dict[str, Values] = dict(summary["variants"])
    baseline = next((name for name, row in rows.items() if name == summary.get("baseline", "base")), None)
    judged = {name: row for name, row in rows.items() if name != baseline}
    confidence = (summary.get("gate") or {}).get("confidence")
    texts = list(dict.fromkeys(text for row in rows.values() for text in row.get("texts") or {}))
    level = f"{short_percent(confidence)} interval" if confidence else "interval"
    return [
        Column("variant", {name: _name(name, row) for name, row in rows.items()}, "name"),
        Column(
            "size", {n: Cell(megabytes(row["size_bytes"]) if "size_bytes" in row else "") for n, row in rows.items()}
        ),
        Column("ratio", {name: Cell(times(row.get("ratio"))) for name, row in rows.items()}),
        Column("decode\nspeed", {name: _speed(row) for name, row in rows.items()}),
        Column("items", {name: Cell(f"{row['items']:,}" if "items" in row else "") for name, row in rows.items()}),
        Column(f"retention in %\n({level})", {n: _retention(row, n == baseline) for n, row in rows.items()}),
        *_perplexities(rows, baseline, texts, most_texts),
        Column("KL", {name: Cell(figure(judged.get(name, {}).get("kl"), 3)) for name in rows}),
        Column("same\ntop 1", {name: _share(judged.get(name, {}).get("top1")) for name in rows}),
        Column(
            "verdict",
            {n: Cell("baseline" if n == baseline else row.get("verdict") or "") for n, row in rows.items()},
            "verdict",
        ),
    ]


def one_line(text: object) -> str:
    """A heading or a cell without its line breaks."""
    return " ".join(str(text).split("\n"))


def winner_line(summary: Values) -> str:
    """Which variant is packaged and why, or that none is."""
    name = summary.get("winner")
    if name is None:
        return "No variant passes its gate: nothing will be packaged."
    row = summary["variants"].get(name, {})
    size = [megabytes(row["size_bytes"])] if "size_bytes" in row else []
    size += [f"{times(row['ratio'])} smaller than the baseline"] if "ratio" in row else []
    return f"Winner: {name}, the smallest that passes" + (f" ({', '.join(size)})." if size else ".")


def reasons(summary: Values) -> dict[str, str]:
    """The verdict on each variant that has one, and its reason."""
    rows = summary["variants"].items()
    return {name: f"{row['verdict']}, {row['reason']}." for name, row in rows if row.get("reason")}


def legend(summary: Values) -> str:
    """What the columns mean."""
    gate = summary["gate"]
    return (
        f"Retention: mean over the tasks of score / baseline's score, with {interval_method(gate)}. KL: divergence "
        "from the baseline in nats a token; same top 1: tokens predicted alike; both averaged over the texts."
    )


def interval_method(gate: Values) -> str:
    """How the intervals of the retention were found; a summary of an earlier version has no `sequential`."""
    level = short_percent(gate["confidence"])
    if gate.get("sequential"):
        return (
            f"a repeated {level} confidence interval over the paired items, which allows for scoring items only until "
            "the verdict is certain"
        )
    return f"a paired-bootstrap interval over the items ({level}, {gate['resamples']:,} resamples)"


def _name(name: str, row: Values) -> Cell:
    bits = row.get("bits") and row.get("bits_per_weight")
    remarks = [made_as(row), f"{figure(bits)} bits a weight" if bits else ""]
    remarks += [f"output layer {row['output_layer']}"] if row.get("output_layer") else []
    return Cell(name, remark=", ".join(filter(None, remarks)))


def _speed(row: Values) -> Cell:
    """Decode speed against the baseline's, or that this runtime has no fast kernel for the format."""
    speed = row.get("speed")
    if not speed:
        return Cell()
    if speed.get("fast_kernel"):
        return Cell(times(speed.get("decode_ratio")))
    return Cell("no fast\nkernel", remark=speed.get("note") or "")


def _retention(row: Values, base: bool) -> Cell:
    kept = row.get("retention") or {}
    if base:
        return Cell("100.0")
    return Cell(f"{100 * kept['mean']:.1f}", interval(kept)) if {"mean", "low", "high"} <= kept.keys() else Cell()


def _perplexities(
    rows: Mapping[str, Values], baseline: str | None, texts: Sequence[str], most: int | None
) -> list[Column]:
    found = {name: {text: (row.get("texts") or {}).get(text) or {} for text in texts} for name, row in rows.items()}
    changes = {
        name: {text: "" if name == baseline else change(values.get("perplexity_change")) for text, values in of.items()}
        for name, of in found.items()
    }
    if most is not None and len(texts) > most:
        shared = {name: Cell("\n".join(f"{text} {by}" for text, by in of.items())) for name, of in changes.items()}
        return [Column("perplexity\nchange", shared)]
    return [
        Column(
            f"perplexity,\n{text}",
            {name: Cell(figure(of[text].get("perplexity")), changes[name][text]) for name, of in found.items()},
        )
        for text in texts
    ]


def _share(value: float | None) -> Cell:
    return Cell() if value is None else Cell(percent(value))
