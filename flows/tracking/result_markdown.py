"""The result of a run as Markdown, for Prefect's pages: the field, the verdicts, the winner. All is in summary.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.reporting.number_format import change, figure, interval, megabytes, percent, short_percent, times
from tasks.settings import BASE

Values = Mapping[str, Any]


def result(summary: Values, plot: str) -> str:
    """Table, reasons, winner, the `plot` as it is given, notes, the contract's hash; what is not there is empty."""
    table, reasons = "\n".join(_table(summary)), "\n".join(_reasons(summary))
    parts = [table, reasons, _winner(summary), plot, *summary.get("notes", [])]
    if contract := summary.get("contract_hash"):
        parts.append(f"Evaluation contract `{contract}`; all of it is in report/index.html.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(summary: Values) -> Iterator[str]:
    rows: Values = summary["variants"]
    texts = list(dict.fromkeys(text for row in rows.values() for text in row.get("texts") or {}))
    confidence = (summary.get("gate") or {}).get("confidence")
    kept = f"retention in % ({short_percent(confidence)} interval)" if confidence else "retention in % (interval)"
    yield _line(
        ["variant", "size", "ratio", "speed", kept, *(f"perplexity, {t}" for t in texts), "KL", "same top 1", "verdict"]
    )
    yield _line(["---", *["---:"] * (6 + len(texts)), "---"])
    for name, row in rows.items():
        base = name == summary.get("baseline", BASE)
        yield _line(
            [
                name,
                megabytes(row["size_bytes"]) if "size_bytes" in row else "",
                times(row.get("ratio")),
                _speed(row),
                "100.0" if base else _kept(row),
                *(_perplexity((row.get("texts") or {}).get(text) or {}, base) for text in texts),
                "" if base else figure(row.get("kl"), 3),
                "" if base or row.get("top1") is None else percent(row["top1"]),
                "baseline" if base else str(row.get("verdict") or ""),
            ]
        )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _speed(row: Values) -> str:
    speed = row.get("speed")
    if not speed:
        return ""
    return times(speed.get("decode_ratio")) if speed.get("fast_kernel") else "no fast kernel"


def _kept(row: Values) -> str:
    kept = row.get("retention") or {}
    if not {"mean", "low", "high"} <= kept.keys():
        return ""
    return f"{100 * kept['mean']:.1f} ({interval(kept)})"


def _perplexity(text: Values, base: bool) -> str:
    changed = "" if base else change(text.get("perplexity_change"))
    return ", ".join(filter(None, [figure(text.get("perplexity")), changed]))


def _reasons(summary: Values) -> Iterator[str]:
    for name, row in summary["variants"].items():
        if row.get("reason"):
            yield f"- **{name}**: {row['verdict']}, {row['reason']}."


def _winner(summary: Values) -> str:
    name = summary.get("winner")
    if name is None:
        return "**No variant passes its gate: nothing will be packaged.**"
    return f"**Winner: {name}**, the smallest that passes."
