"""Quality over size on disk: one picture with every variant, its interval, the gates and the Pareto front."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox, IdentityTransform

from tasks.reporting.number_format import megabytes, percent, short_percent

# after M. Okabe and K. Ito's colours, which colour-blind people can tell apart; the shapes differ as well
KINDS = ("pass", "fail", "inconclusive", "baseline")
INKS = ("ink", "faint", "paper", "grid", "front")
LIGHT = dict(zip(KINDS, ("#0072B2", "#C44E00", "#9A6A00", "#444c56"), strict=True))
LIGHT |= dict(zip(INKS, ("#1f2328", "#59636e", "#ffffff", "#e6e9ed", "#9aa4af"), strict=True))
DARK = dict(zip(KINDS, ("#56B4E9", "#F0803C", "#E6B422", "#d0d7de"), strict=True))
DARK |= dict(zip(INKS, ("#e6edf3", "#9198a1", "#161b22", "#2a313a", "#5b6570"), strict=True))
MARKERS = dict(zip(KINDS, "oXsD", strict=True))
WORDS = dict(zip(KINDS, ("passes", "fails", "inconclusive", "baseline"), strict=True))
MARKER_SIZE = 10
DISTANCES = range(12, 300, 12)  # pixels from a point to its label

Point = tuple[float, float]


def pareto(summary: Mapping[str, Any], dark: bool = False) -> bytes:
    """The plot as a PNG of 1000 x 620 pixels; the same bytes for the same summary."""
    colours = DARK if dark else LIGHT
    rows = summary["variants"]
    points = {v: (r["size_bytes"] / 1e6, 100 * (r["retention"] or {"mean": 1})["mean"]) for v, r in rows.items()}
    with rc_context({"font.family": "DejaVu Sans", "font.size": 10.5, "text.color": colours["ink"]}):
        figure = Figure(figsize=(10, 6.2), dpi=100, facecolor=colours["paper"], layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _frame(axes, summary, colours)
        _front(axes, points, colours)
        bars = [_point(axes, points[v], row, colours) for v, row in rows.items()]
        _legend(axes, rows.values(), colours)
        canvas.draw()  # lays the figure out, so that the labels can be placed in pixels
        _labels(axes, canvas, points, rows, bars, colours)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", facecolor=colours["paper"], metadata={"Software": None})
    return picture.getvalue()


def front(points: Mapping[str, Point]) -> list[str]:
    """The variants that no other beats in both size (small is better) and quality, from small to large."""
    best, found = float("-inf"), []
    for name in sorted(points, key=lambda n: (points[n][0], -points[n][1], n)):
        if points[name][1] > best:
            best = points[name][1]
            found.append(name)
    return found


def _frame(axes: Axes, summary: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    rows = summary["variants"]
    kept = [100 * r["retention"][k] for r in rows.values() if r["retention"] for k in ("low", "high")]
    gates = {100 * r["gate"]: r["bits"] for r in rows.values() if r["gate"]}
    low, high = min(*kept, *gates, 100), max(*kept, *gates, 100)
    sizes = [r["size_bytes"] / 1e6 for r in rows.values()]
    margin = max(0.15 * (high - low), 0.5)
    axes.set_ylim(low - margin, high + margin)
    spread = max(max(sizes) - min(sizes), 0.1 * max(sizes))
    axes.set_xlim(max(0, min(sizes) - 0.16 * spread), max(sizes) + 0.16 * spread)
    axes.set_facecolor(colours["paper"])
    axes.grid(color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colours["faint"])
    axes.tick_params(colors=colours["faint"])
    axes.set_xlabel("size on disk (MB), smaller is better", color=colours["ink"], labelpad=8)
    confidence = short_percent(summary["gate"]["confidence"])
    axes.set_ylabel(
        f"retention (% of the baseline's score), with {confidence} interval", color=colours["ink"], labelpad=8
    )
    axes.set_title("Quality over size", loc="left", fontsize=14, fontweight="bold", pad=34)
    for gate in sorted(gates):
        wide = sorted({f"{r['bits']}-bit" for r in rows.values() if r["gate"] and 100 * r["gate"] == gate})
        axes.axhline(gate, color=colours["faint"], linewidth=1.1, linestyle="--", dashes=(6, 4), zorder=1)
        axes.annotate(
            f"gate {', '.join(wide)}: {gate:g}%",
            (1, gate),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9.5,
            color=colours["faint"],
        )


def _front(axes: Axes, points: Mapping[str, Point], colours: Mapping[str, str]) -> None:
    for piece in _front_ends(points):
        axes.plot(*zip(*piece, strict=True), color=colours["front"], linewidth=2, zorder=2, solid_capstyle="round")


def _front_ends(points: Mapping[str, Point]) -> list[list[Point]]:
    """The straight pieces of the front: along to the next size, then up."""
    pieces: list[list[Point]] = []
    best = [points[v] for v in front(points)]
    for (x0, y0), (x1, y1) in pairwise(best):
        pieces += [[(x0, y0), (x1, y0)], [(x1, y0), (x1, y1)]]
    return pieces


def _point(axes: Axes, point: Point, row: Mapping[str, Any], colours: Mapping[str, str]) -> Bbox:
    """Draw a variant; the box of its interval, in data units."""
    kind = row["verdict"] or "baseline"
    low, high = (100 * row["retention"][k] for k in ("low", "high")) if row["retention"] else (point[1], point[1])
    if row["retention"]:
        axes.plot(
            [point[0]] * 2,
            [low, high],
            color=colours[kind],
            linewidth=2.2,
            marker="_",
            markersize=9,
            zorder=3,
        )
    axes.plot(
        *point,
        marker=MARKERS[kind],
        color=colours[kind],
        markersize=MARKER_SIZE + 2 * (kind == "fail"),  # a cross of the same size looks smaller
        markeredgecolor=colours["paper"],
        markeredgewidth=1.2,
        zorder=4,
    )
    return Bbox([[point[0], low], [point[0], high]])


def _legend(axes: Axes, rows: Any, colours: Mapping[str, str]) -> None:
    present = {row["verdict"] or "baseline" for row in rows}
    handles = [
        Line2D([], [], marker=MARKERS[k], color=colours[k], linestyle="none", markersize=8, label=WORDS[k])
        for k in MARKERS
        if k in present
    ]
    handles.append(Line2D([], [], color=colours["front"], linewidth=2, label="Pareto front"))
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(handles),
        frameon=False,
        labelcolor=colours["ink"],
        handletextpad=0.4,
        columnspacing=1.6,
    )


def _labels(
    axes: Axes,
    canvas: FigureCanvasAgg,
    points: Mapping[str, Point],
    rows: Mapping[str, Any],
    bars: Sequence[Bbox],
    colours: Mapping[str, str],
) -> None:
    """Name every point where its name covers nothing: of the places around it, the nearest that is free."""
    renderer = canvas.get_renderer()
    inside = axes.get_window_extent()
    taken = [axes.transData.transform_bbox(bar).padded(MARKER_SIZE * 0.7) for bar in bars]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    lines = [axes.transData.transform_bbox(Bbox(ends)) for ends in _front_ends(points)]
    lines += [line.get_window_extent(renderer) for line in axes.lines if line.get_linestyle() == "--"]
    for name, row in rows.items():
        kind, kept = row["verdict"] or "baseline", row["retention"]
        quality = percent(kept["mean"] if kept else 1)
        label = axes.text(
            0,
            0,
            f"{name}\n{megabytes(row['size_bytes'])}, {quality}",
            color=colours[kind],
            transform=IdentityTransform(),
            linespacing=1.35,
            zorder=5,
        )
        extent = label.get_window_extent(renderer)
        x, y = axes.transData.transform(points[name])
        at = (float(x), float(y))
        box = free_place(at, extent, taken, lines, inside)
        label.set_position((box.x0 - extent.x0, box.y0 - extent.y0))
        taken.append(box)
        end = (min(max(at[0], box.x0), box.x1), min(max(at[1], box.y0), box.y1))
        if abs(end[0] - at[0]) + abs(end[1] - at[1]) > 2 * DISTANCES[0]:
            leader = Line2D(*zip(at, end, strict=True), color=colours[kind], linewidth=0.8, alpha=0.7)
            leader.set_transform(IdentityTransform())
            axes.add_line(leader)


def free_place(at: Point, extent: Bbox, taken: Sequence[Bbox], lines: Sequence[Bbox], area: Bbox) -> Bbox:
    """Where a text of `extent`'s size covers least, as near to the point `at` as may be; all in pixels."""
    places = (_beside(at, extent, dx, dy) for distance in DISTANCES for dx, dy in _around(distance))
    return min(places, key=lambda box: _cost(box, taken, lines, area))


def _around(distance: float) -> list[Point]:
    """Offsets at a distance: the corners first, then straight, then between the two."""
    straight = [(1, 0), (-1, 0), (0, 1), (0, -1)]
    corners = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    between = [(a, b) for x, y in corners for a, b in ((x, y / 2), (x / 2, y))]
    return [(distance * x, distance * y) for x, y in corners + straight + between]


def _beside(at: Point, extent: Bbox, dx: float, dy: float) -> Bbox:
    """The box of a text whose nearest edge or corner is (dx, dy) pixels from `at`."""
    x0 = at[0] + dx - (extent.width if dx < 0 else extent.width / 2 if dx == 0 else 0)
    y0 = at[1] + dy - (extent.height if dy < 0 else extent.height / 2 if dy == 0 else 0)
    return Bbox.from_bounds(x0, y0, extent.width, extent.height)


def _cost(box: Bbox, taken: Sequence[Bbox], lines: Sequence[Bbox], area: Bbox) -> int:
    """How bad a place is: a line behind a text is ugly, another text or a point behind it is unreadable."""
    outside = box.x0 < area.x0 or box.x1 > area.x1 or box.y0 < area.y0 or box.y1 > area.y1
    return box.padded(1).count_overlaps(lines) + 10 * box.padded(2).count_overlaps(taken) + 20 * outside
