"""The HTML report: one file that opens offline and follows the reader's light or dark mode."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from tasks.reporting.columns import columns, legend, winner_line
from tasks.reporting.number_format import words
from tasks.reporting.render import render

WORST = 8  # layers shown per variant; the folded list has all of them

Picture = tuple[bytes, bytes]  # PNG, in light and dark


def page(
    summary: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, float]],
    calibration: Mapping[str, Any],
    plot: Picture,
    heats: Mapping[str, Picture],
    structure: Mapping[str, Any],
) -> str:
    """Render the page.

    layers: each variant's relative error by layer; calibration: the quality report of the calibration data; heats: the
    heat map of each mixed-precision variant; structure: what was found in the decoder's layers, may be empty.
    """
    return render(
        "report.html.j2",
        escape=True,
        summary=summary,
        rows=summary["variants"],
        baseline=summary["variants"][summary["baseline"]],
        judged={v: row for v, row in summary["variants"].items() if row["verdict"]},
        layers={v: _worst(errors) for v, errors in layers.items() if errors},
        calibration=flat(calibration),
        contract=flat(summary["contract"]),
        winner=winner_line(summary),
        table=columns(summary),
        legend=legend(summary),
        plot=_text(plot),
        heats={v: _text(heat) for v, heat in heats.items()},
        structure=structure,
    )


def _text(picture: Picture) -> dict[str, str]:
    """Base64 text, for a data URL."""
    return {kind: base64.b64encode(png).decode("ascii") for kind, png in zip(("light", "dark"), picture, strict=True)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a nested JSON object to rows of text: {'overlap': {'boolq': 0}} -> {'overlap, boolq': '0'}."""
    rows: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping) and value:
            rows |= flat(value, f"{name}, ")
        elif isinstance(value, float):
            rows[name] = f"{value:,.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            rows[name] = f"{value:,}"
        else:
            rows[name] = words(value)
    return rows


def _worst(errors: Mapping[str, float]) -> dict[str, Any]:
    """All layers from worst to best, with bar lengths in percent of the worst layer's."""
    most = max(errors.values()) or 1.0
    order = sorted(errors.items(), key=lambda e: (-e[1], e[0]))
    rows = [(name.removeprefix("model."), error, round(100 * error / most, 1)) for name, error in order]
    return {"top": rows[:WORST], "all": rows}
