"""The HTML page: one file that opens offline, in light or dark as the reader's machine has it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from tasks.reporting.columns import columns, legend, winner_line
from tasks.reporting.number_format import words
from tasks.reporting.render import render

WORST = 8  # layers of each variant that are drawn; all of them are in the folded table

Picture = tuple[bytes, bytes]  # PNG, in light and dark


def page(
    summary: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, float]],
    calibration: Mapping[str, Any],
    plot: Picture,
    heats: Mapping[str, Picture],
) -> str:
    """Render the page.

    `layers` has each variant's relative error by layer; `calibration` is the calibration's quality report; `heats` has
    the heat map of each variant that mixes precisions.
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
    )


def _text(picture: Picture) -> dict[str, str]:
    """As a page holds it."""
    return {kind: base64.b64encode(png).decode("ascii") for kind, png in zip(("light", "dark"), picture, strict=True)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Any nested JSON object as rows of text: {'overlap': {'boolq': 0}} -> {'overlap, boolq': '0'}."""
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
    """Every layer from the worst to the best, with the length of its bar in percent of the worst one's."""
    most = max(errors.values()) or 1.0
    order = sorted(errors.items(), key=lambda e: (-e[1], e[0]))
    rows = [(name.removeprefix("model."), error, round(100 * error / most, 1)) for name, error in order]
    return {"top": rows[:WORST], "all": rows}
