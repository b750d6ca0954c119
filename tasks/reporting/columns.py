"""The columns and sentences of the result table, for every output.

The terminal (tasks/reporting/table.py), the HTML page and Prefect's pages (flows/tracking/) only do the layout. A
summary may come from a custom report stage: values that it omits are shown as empty cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks.reporting.labels import made_as
from tasks.reporting.number_format import change, figure, interval, megabytes, percent, short_percent, times
from tasks.reporting.served import has_server, loaded, proof, ratios, throughput_ratio

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A cell. detail: an addition to `text`, such as an interval or a change; remark: for outputs with room for it."""

    text: str = ""
    detail: str = ""
    remark: str = ""

    def __str__(self) -> str:
        """The cell without its remark."""
        return f"{self.text} ({self.detail})" if self.text and self.detail else self.text or self.detail


@dataclass(frozen=True)
class Column:
    """A column: its heading, and its cells by row name. Both may contain line breaks."""

    heading: str
    cells: Mapping[str, Cell]
    kind: Literal["name", "figure", "verdict"] = "figure"


def columns(summary: Values, most_texts: int | None = None) -> list[Column]:
    """The columns of the table, with the variants in the summary's order.

    most_texts: if there are more texts, one column shows the perplexity changes of all texts.
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
        _speeds(summary, rows, baseline),
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
        *_served(summary),
    ]


def _speeds(summary: Values, rows: Mapping[str, Values], baseline: str | None) -> Column:
    """Tokens per second of the servers with several requests at once; without a server, the speed of writing."""
    if not loaded(summary):
        return Column("decode\nspeed", {name: _speed(row) for name, row in rows.items()})
    return Column("tokens/s\nunder load", {name: _throughput(row, name == baseline) for name, row in rows.items()})


def _served(summary: Values) -> list[Column]:
    """One column if the target has a server."""
    if not has_server(summary):
        return []
    found = {name: row.get("serving") or {} for name, row in summary["variants"].items()}
    return [Column("served", {name: Cell(one.get("state") or "", remark=proof(one)) for name, one in found.items()})]


def one_line(text: object) -> str:
    """A heading or a cell without its line breaks."""
    return " ".join(str(text).split("\n"))


def reasons(summary: Values) -> dict[str, str]:
    """The verdict on each variant with its reason, and why it was not served."""
    rows = summary["variants"].items()
    found = {name: f"{row['verdict']}, {row['reason']}." for name, row in rows if row.get("reason")}
    for name, row in rows:
        if has_server(summary) and (row.get("serving") or {}).get("state") not in (None, "served"):
            told = f"{row['serving']['state']}: {row['serving']['reason']}."
            found[name] = f"{found[name]} {told[0].upper()}{told[1:]}" if name in found else told
    return found


def legend(summary: Values) -> str:
    """What the columns mean."""
    gate = summary["gate"]
    load = next(iter(loaded(summary).values()), {}).get("load")
    at_once = load and f"{load['main']['concurrency']} requests at once"
    speed = f"Tokens/s under load: of the server with {at_once}, relative to the baseline's. " if load else ""
    return (
        f"{speed}Retention: mean over the tasks of score / baseline's score, with {interval_method(gate)}. "
        "KL: divergence from the baseline, in nats per token. Same top 1: share of positions with the "
        "same most likely token as the baseline. Both are averaged over the texts."
    )


def interval_method(gate: Values) -> str:
    """The method for the intervals of the retention. Summaries of earlier versions have no `sequential`."""
    level = short_percent(gate["confidence"])
    if gate.get("sequential"):
        return (
            f"a repeated {level} confidence interval over the paired items, which remains valid when scoring stops "
            "early"
        )
    return f"a paired-bootstrap interval over the items ({level}, {gate['resamples']:,} resamples)"


def _name(name: str, row: Values) -> Cell:
    bits = row.get("bits") and row.get("bits_per_weight")
    remarks = [made_as(row), f"{figure(bits)} bits per weight" if bits else ""]
    remarks += [f"output layer {row['output_layer']}"] if row.get("output_layer") else []
    return Cell(name, remark=", ".join(filter(None, remarks)))


def _speed(row: Values) -> Cell:
    """Decode speed relative to the baseline, or a remark if the runtime has no fast kernel for the format."""
    speed = row.get("speed")
    if not speed:
        return Cell()
    if speed.get("fast_kernel"):
        return Cell(times(speed.get("decode_ratio")))
    return Cell("no fast\nkernel", remark=speed.get("note") or "")


def _throughput(row: Values, base: bool) -> Cell:
    """Tokens per second relative to the baseline, or a remark if the server was not measured."""
    load = row.get("load")
    if not load:
        return Cell("not\nmeasured", remark=(row.get("speed") or {}).get("note") or "")
    if base:
        return Cell(times(1.0))
    return Cell(times(throughput_ratio(row)), remark=ratios(load).get("tokens per second", ""))


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
