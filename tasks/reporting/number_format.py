"""Number formats for readers, shared by the table, the page and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def percent(value: float, digits: int = 1) -> str:
    """0.9731 -> '97.3%'."""
    return f"{100 * value:.{digits}f}%"


def percent_beside(value: float, mark: float) -> str:
    """Like `percent`, with enough digits to show on which side of `mark` the value lies."""
    digits = 1
    while value != mark and digits < 6 and f"{100 * value:.{digits}f}" == f"{100 * mark:.{digits}f}":
        digits += 1
    return percent(value, digits)


def short_percent(value: float) -> str:
    """A setting without superfluous zeros: 0.95 -> '95%', 0.975 -> '97.5%'."""
    return f"{round(100 * value, 6):g}%"


def change(value: float | None) -> str:
    """A relative change with its sign: 0.201 -> '+20.1%'."""
    return "" if value is None else f"{100 * value:+.1f}%"


def interval(ends: Mapping[str, Any]) -> str:
    """{low: 0.959, high: 0.988} -> '95.9 to 98.8': in percent, without the sign."""
    return f"{100 * ends['low']:.1f} to {100 * ends['high']:.1f}"


def megabytes(size: float) -> str:
    """Bytes in units of 10^6, as disks are sold: 112_300_000 -> '112 MB'."""
    mega = size / 1e6
    if mega >= 10_000:
        return f"{mega / 1000:,.1f} GB"
    return f"{mega:,.0f} MB" if mega >= 100 else f"{mega:.1f} MB" if mega >= 0.1 else f"{size / 1e3:.1f} kB"


def times(value: float | None) -> str:
    """A ratio: 2.4 -> '2.40x'."""
    return "" if value is None else f"{value:.2f}x"


def figure(value: float | None, digits: int = 2) -> str:
    """A number with thousands separators; empty for None."""
    return "" if value is None else f"{value:,.{digits}f}"


def words(value: Any) -> str:
    """A JSON value as text, without JSON's punctuation."""
    if value in (None, [], {}, ""):
        return "none"
    if isinstance(value, list):
        return ", ".join(words(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {words(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
