"""What a reader decides by: the verdict, the winner's figures and what to do next, for every output.

A summary may come from a custom report stage: figures that it omits are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.reporting.labels import made_as
from tasks.reporting.number_format import figure, interval, megabytes, percent, short_percent, times
from tasks.reporting.served import WITHOUT, engine, failed_to_serve, proof, ratios, throughput_ratio

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure with its name, and what it is measured against."""

    label: str
    value: str
    detail: str


def headline(summary: Values) -> str:
    """The verdict on the run."""
    name = summary.get("winner")
    return f"{name} passes its gate" if name else _without_winner(summary)


def winner_line(summary: Values) -> str:
    """A sentence that names the packaged variant and the reason, or says that there is none."""
    name = summary.get("winner")
    if name is None:
        return f"{_without_winner(summary)}, so nothing will be packaged."
    row = summary["variants"].get(name, {})
    size = [megabytes(row["size_bytes"])] if "size_bytes" in row else []
    size += [f"{times(row['ratio'])} smaller than the baseline"] if "ratio" in row else []
    return f"Winner: {name}, the smallest that passes" + (f" ({', '.join(size)})." if size else ".")


def _without_winner(summary: Values) -> str:
    return "No variant that passes its gate is served" if _unserved(summary) else "No variant passes its gate"


def _unserved(summary: Values) -> list[str]:
    """The variants that pass but were not served."""
    rows = summary["variants"].items()
    return [name for name, row in rows if row.get("verdict") == "pass" and failed_to_serve(row)]


def shown_variant(summary: Values) -> str | None:
    """The winner; without one, the variant that comes closest; None if none was judged."""
    judged = {name: kept for name, row in summary["variants"].items() if (kept := row.get("retention"))}
    closest = max(judged, key=lambda name: judged[name].get("at_least", judged[name]["mean"]), default=None)
    return summary.get("winner") or closest


def figures(summary: Values) -> list[Figure]:
    """The figures of `shown_variant`: how it was made, size, retention and speed."""
    name = shown_variant(summary)
    row: Values = summary["variants"].get(name) or {}
    base: Values = summary["variants"].get(summary.get("baseline")) or {}
    found = []
    if name and not summary.get("winner"):
        found.append(Figure("closest", name, made_as(row)))
    elif row.get("bits_per_weight"):
        found.append(Figure("weights", f"{figure(row['bits_per_weight'])} bits", made_as(row)))
    if "size_bytes" in row:
        against = f" than the baseline's {megabytes(base['size_bytes'])}" if "size_bytes" in base else ""
        found.append(Figure("size", megabytes(row["size_bytes"]), f"{times(row.get('ratio'))} smaller{against}"))
    if kept := row.get("retention"):
        level = short_percent((summary.get("gate") or {}).get("confidence", 0.95))
        gate = f"; gate {short_percent(row['gate'])}" if row.get("gate") else ""
        found.append(Figure("retention", percent(kept["mean"]), f"{level} interval {interval(kept)}{gate}"))
    if speed := row.get("speed"):
        found.append(_speed(speed))
    if load := row.get("load"):
        found.append(_under_load(load))
    if (serving := row.get("serving") or {}).get("state") not in (None, WITHOUT):
        value = f"by {engine(serving)}" if serving["state"] == "served" else serving["state"]
        found.append(Figure("served", value, proof(serving)))
    return found


def next_step(summary: Values) -> str:
    """What to do with the verdict, as one sentence."""
    rows: Mapping[str, Values] = summary["variants"]
    if name := summary.get("winner"):
        speed = rows.get(name, {}).get("speed") or {}
        if speed and not speed.get("fast_kernel"):
            return (
                f"Next: measure {name}'s speed in the engine that will serve it, because {_engine(speed)} has no fast "
                "kernel for its format, and try it on your own tasks before you deploy the bundle in dist/."
            )
        return f"Next: try {name} on your own tasks, then deploy the bundle in dist/."
    if unserved := _unserved(summary):
        return (
            f"Next: find out why {unserved[0]}, which passes its gate, was not served: the reason is below the table."
        )
    needed = {name: items for name, row in rows.items() if (items := row.get("items_needed"))}
    if needed:
        name = min(needed, key=lambda one: (needed[one], one))
        items = f"{needed[name]:,} items per task"
        return f"Next: set evaluation.limit to {items}, which decides about {name} if its estimate holds."
    return "Next: give a variant more bits, such as a smaller group_size or an 8-bit scheme, or lower its gate."


def decisive(summary: Values) -> dict[str, Any]:
    """The winner's name, and each variant's figures and verdict: the table's, unrounded."""
    return {
        "winner": summary["winner"],
        "variants": {
            name: {
                **{key: row[key] for key in ("size_bytes", "ratio", "items", "kl", "top1", "verdict")},
                "decode_ratio": row["speed"]["decode_ratio"],
                "throughput_ratio": throughput_ratio(row),
                "served": row["serving"]["state"],
                "retention": row["retention"] and {key: row["retention"][key] for key in ("mean", "low", "high")},
                "perplexity": {text: values["perplexity"] for text, values in row["texts"].items()},
                "completions": row["completions"],
            }
            for name, row in summary["variants"].items()
        },
    }


def _under_load(load: Values) -> Figure:
    main, compared = load["main"], ratios(load).get("tokens per second")
    against = f"; {compared} times the baseline's" if compared else ""
    value = f"{figure(main['tokens_per_second'], 1)} tokens/s"
    return Figure("under load", value, f"{main['concurrency']} requests at once{against}")


def _engine(speed: Values) -> str:
    runtime = speed.get("runtime") or {}
    return " ".join(filter(None, [runtime.get("name"), runtime.get("version")])) or "this runtime"


def _speed(speed: Values) -> Figure:
    where = f"{_engine(speed)} on {(speed.get('runtime') or {}).get('device') or 'this machine'}"
    if not speed.get("fast_kernel"):
        return Figure("decode speed", "no figure", f"{where} has no fast kernel for its format")
    written = figure(speed.get("decode_tokens_per_second"), 1)
    detail = f"of the baseline's, {f'{written} tokens/s ' if written else ''}in {where}"
    return Figure("decode speed", times(speed.get("decode_ratio")), detail)
