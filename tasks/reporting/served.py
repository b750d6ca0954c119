"""What the stage serve found, for every output: whether the target's real server serves a variant as it was evaluated.

The states are tasks/serve.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tasks.reporting.number_format import figure

Values = Mapping[str, Any]
KEPT = ("state", "reason", "engine", "version", "command", "start_seconds", "machine", "findings", "agreement", "items")
WITHOUT = "no server"


def serving(record: Values) -> dict[str, Any]:
    """The part of metrics/serve/T/V.json that the summary keeps."""
    return {key: record.get(key) for key in KEPT}


def failed_to_serve(row: Values) -> bool:
    """Whether the target's server did not start with the variant, or did not answer as it was evaluated."""
    return (row.get("serving") or {}).get("state") == "not served"


def has_server(summary: Values) -> bool:
    """Whether the summary's target has a server."""
    states = [(row.get("serving") or {}).get("state") for row in summary["variants"].values()]
    return any(state not in (None, WITHOUT) for state in states)


def engine(found: Values) -> str:
    """The server's name and version."""
    return " ".join(filter(None, [found.get("engine"), found.get("version")]))


def proof(found: Values) -> str:
    """What was checked of a served variant, in a few words; the reason for one that is not served."""
    if found.get("state") != "served":
        return found.get("reason") or ""
    count = Counter(one["state"] for one in found.get("findings") or [])
    words = [f"{count['passed']} checks passed"]
    words += [f"{count['not offered']} not offered by the server"] if count["not offered"] else []
    if same := found.get("agreement"):
        ties = f", {same['near_ties']} more up to a near-tie" if same["near_ties"] else ""
        words.append(f"{same['equal']} of {same['texts']} greedy texts as evaluated{ties}")
        if same["difference"] is not None:
            words.append(
                f"mean log-probability of {same['tokens']:,} tokens "
                f"{same['difference']:+.5f} nats from the evaluation's"
            )
    if items := found.get("items"):
        words.append(f"{items['equal']} of {items['scored']} item scores of lm-eval through the server as evaluated")
    return "; ".join(words)


def loaded(summary: Values) -> dict[str, Values]:
    """The rows of the variants with a load test."""
    return {name: row for name, row in summary["variants"].items() if row.get("load")}


def under_load(load: Values) -> list[tuple[str, str]]:
    """The figures of a load test by name: what one server does at the main concurrency and at its best."""
    main = load["main"]
    found = [
        ("requests at once", str(main["concurrency"])),
        ("tokens per second", figure(main["tokens_per_second"], 1)),
        ("time to first token, p50 and p95", _both(main["time_to_first_token"])),
        ("time per further token, p50 and p95", _both(main["time_per_token"])),
        ("latency, p50 and p95", _both(main["latency"])),
        ("requests per second within the objective", figure(main["goodput"])),
    ]
    if load["saturation"]:
        found.append(("doubling adds 5% or less from", f"{load['saturation']} requests at once"))
    if cost := load.get("cost"):
        found.append(("cost of a million tokens, lowest", figure(cost["lowest"])))
    return found


def ratios(load: Values) -> dict[str, str]:
    """By figure: the ratio to the baseline with its interval, or that it is a tie."""
    return {
        name.replace("_", " "): f"{one['mean']:.2f} ({one['low']:.2f} to {one['high']:.2f})"
        + (", a tie" if one["tie"] else "")
        for name, one in (load.get("ratios") or {}).items()
    }


def throughput_ratio(row: Values) -> float | None:
    """A variant's tokens per second over the baseline's; None if they were not compared."""
    compared = (row.get("load") or {}).get("ratios")
    return compared and compared["tokens_per_second"]["mean"]


def _both(percentiles: Values) -> str:
    return f"{1000 * percentiles['p50']:.0f} and {1000 * percentiles['p95']:.0f} ms"
