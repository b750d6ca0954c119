"""Plot of quality over size on disk: all variants with intervals, the gates and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import textalloc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation

from tasks.reporting.number_format import megabytes, percent, short_percent
from tasks.reporting.palette import KINDS, LIGHT
from tasks.reporting.plot_frame import FONT_SIZE, NARROW, ROOM, WIDE, as_png, as_svg, empty_axes, frame

MARKERS = dict(zip(KINDS, "oXsD", strict=True))
WORDS = dict(zip(KINDS, ("passes", "fails", "inconclusive", "baseline"), strict=True))
LONGEST = 20  # letters of a label in a narrower plot
MARKER_SIZE = 10  # points
MARKER_PIXELS = 8  # from the centre to the edge

Point = tuple[float, float]
Line = list[Point]


def pareto(summary: Mapping[str, Any]) -> bytes:
    """The plot as a PNG of 1000 x 620 pixels. The same summary gives the same bytes."""
    return as_png(lambda: draw(summary, title="Quality over size"))


def pareto_svg(summary: Mapping[str, Any], narrow: bool) -> str:
    """The plot for an HTML page, whose CSS variables are its colours. narrow: for a phone."""
    name, size = ("narrow", NARROW) if narrow else ("wide", WIDE)
    return as_svg(lambda: draw(summary, size), name)


def draw(summary: Mapping[str, Any], size: tuple[float, float] = WIDE, title: str = "") -> Figure:
    """The plot as a matplotlib figure with one pair of axes; the last texts of the axes are the variants' labels."""
    rows = summary["variants"]
    points = {v: (r["size_bytes"] / 1e6, 100 * (r["retention"] or {"mean": 1})["mean"]) for v, r in rows.items()}
    figure, axes = empty_axes(size)
    gates = _frame(axes, summary, title)
    _front(axes, points)
    bars = [_point(axes, points[v], row) for v, row in rows.items()]
    _legend(axes, rows.values(), 2 if size[0] < ROOM else 5)
    names = [short(name) if size[0] < ROOM else _label(name, row) for name, row in rows.items()]
    figure.draw_without_rendering()  # lays the figure out, so that the labels can be placed in pixels
    _labels(axes, points, names, rows, [*bars, *_front_ends(points), *_outlines(axes, gates)])
    return figure


def front(points: Mapping[str, Point]) -> list[str]:
    """The Pareto-optimal variants by size (smaller is better) and quality, from small to large."""
    best, found = float("-inf"), []
    for name in sorted(points, key=lambda n: (points[n][0], -points[n][1], n)):
        if points[name][1] > best:
            best = points[name][1]
            found.append(name)
    return found


def _frame(axes: Axes, summary: Mapping[str, Any], title: str) -> list[Annotation]:
    """Draw axes, grid and gates; return the labels of the gates."""
    rows = summary["variants"]
    kept = [100 * r["retention"][k] for r in rows.values() if r["retention"] for k in ("low", "high")]
    gates = {100 * r["gate"]: r["bits"] for r in rows.values() if r["gate"]}
    low, high = min(*kept, *gates, 100), max(*kept, *gates, 100)
    sizes = [r["size_bytes"] / 1e6 for r in rows.values()]
    margin = max(0.15 * (high - low), 0.5)
    axes.set_ylim(low - margin, high + margin)
    spread = max(max(sizes) - min(sizes), 0.1 * max(sizes))
    axes.set_xlim(max(0, min(sizes) - 0.16 * spread), max(sizes) + 0.16 * spread)
    confidence = short_percent(summary["gate"]["confidence"])
    frame(
        axes,
        "size on disk (MB), smaller is better",
        f"retention in % of the baseline, {confidence} interval",
        title,
        34,
    )
    written = []
    for gate in sorted(gates):
        wide = sorted({f"{r['bits']}-bit" for r in rows.values() if r["gate"] and 100 * r["gate"] == gate})
        axes.axhline(gate, color=LIGHT["faint"], linewidth=1.1, linestyle="--", dashes=(6, 4), zorder=1)
        text = axes.annotate(
            f"gate {', '.join(wide)}: {gate:g}%",
            (1, gate),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9.5,
            color=LIGHT["faint"],
        )
        written.append(text)
    return written


def _front(axes: Axes, points: Mapping[str, Point]) -> None:
    for piece in _front_ends(points):
        axes.plot(*zip(*piece, strict=True), color=LIGHT["front"], linewidth=2, zorder=2, solid_capstyle="round")


def _front_ends(points: Mapping[str, Point]) -> list[Line]:
    """The straight segments of the front: horizontal to the next size, then vertical."""
    pieces: list[Line] = []
    best = [points[v] for v in front(points)]
    for (x0, y0), (x1, y1) in pairwise(best):
        pieces += [[(x0, y0), (x1, y0)], [(x1, y0), (x1, y1)]]
    return pieces


def _point(axes: Axes, point: Point, row: Mapping[str, Any]) -> Line:
    """Draw a variant; return the line of its interval."""
    kind = row["verdict"] or "baseline"
    low, high = (100 * row["retention"][k] for k in ("low", "high")) if row["retention"] else (point[1], point[1])
    if row["retention"]:
        axes.plot(
            [point[0]] * 2,
            [low, high],
            color=LIGHT[kind],
            linewidth=2.2,
            marker="_",
            markersize=9,
            zorder=3,
        )
    axes.plot(
        *point,
        marker=MARKERS[kind],
        color=LIGHT[kind],
        markersize=MARKER_SIZE + 2 * (kind == "fail"),  # a cross of the same size looks smaller
        markeredgecolor=LIGHT["paper"],
        markeredgewidth=1.2,
        zorder=4,
    )
    return [(point[0], low), (point[0], high)]


def _legend(axes: Axes, rows: Any, most: int) -> None:
    present = {row["verdict"] or "baseline" for row in rows}
    handles = [
        Line2D([], [], marker=MARKERS[k], color=LIGHT[k], linestyle="none", markersize=8, label=WORDS[k])
        for k in MARKERS
        if k in present
    ]
    handles.append(Line2D([], [], color=LIGHT["front"], linewidth=2, label="Pareto front"))
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=min(most, len(handles)),
        frameon=False,
        labelcolor=LIGHT["ink"],
        handletextpad=0.4,
        columnspacing=1.6,
    )


def _labels(
    axes: Axes,
    points: Mapping[str, Point],
    names: list[str],
    rows: Mapping[str, Any],
    lines: Sequence[Line],
) -> None:
    """Label every point without covering another label, a point or one of `lines`."""
    inks = [LIGHT[row["verdict"] or "baseline"] for row in rows.values()]
    x, y = np.array([points[name] for name in rows]).T
    textalloc.allocate(
        axes,
        x,
        y,
        names,
        x_scatter=x,
        y_scatter=y,
        scatter_sizes=[MARKER_PIXELS] * len(names),  # type: ignore[list-item]  # numbers, despite its annotation
        x_lines=[[x for x, _ in line] for line in lines],
        y_lines=[[y for _, y in line] for line in lines],
        textsize=FONT_SIZE,
        textcolor=inks,
        linecolor=inks,
        linewidth=0.8,
        margin=0.004,  # shares of the frame
        max_distance=0.6,
        nbr_candidates=3000,
        va="bottom",
        linespacing=1.35,
        path_effects=[withStroke(linewidth=3, foreground=LIGHT["paper"])],  # readable where a line crosses
        zorder=5,
    )


def short(name: str) -> str:
    """A name that fits into a narrow plot."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _label(name: str, row: Mapping[str, Any]) -> str:
    kept = row["retention"]
    return f"{name}\n{megabytes(row['size_bytes'])}, {percent(kept['mean'] if kept else 1)}"


def _outlines(axes: Axes, gates: Sequence[Annotation]) -> list[Line]:
    """The lines of the gates and the outlines of their labels."""
    left, right = axes.get_xlim()
    lines: list[Line] = []
    for text in gates:
        (x0, y0), (x1, y1) = axes.transData.inverted().transform(text.get_window_extent())
        lines += [[(left, text.xy[1]), (right, text.xy[1])], [(x0, y0), (x0, y1), (x1, y1), (x1, y0), (x0, y0)]]
    return lines
