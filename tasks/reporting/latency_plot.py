"""Plot of latency over throughput: one line for each variant and the baseline, with a point for each concurrency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import textalloc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tasks.reporting.palette import LIGHT
from tasks.reporting.pareto_plot import MARKERS, short
from tasks.reporting.plot_frame import NARROW, ROOM, WIDE, as_png, as_svg, empty_axes, frame

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))  # of the variants with the same colour, in turn
SMALL = 9.0  # points: the concurrency beside a point


@dataclass(frozen=True)
class Curve:
    """A server under rising load. kind: of palette.KINDS. levels: of tasks.loadtest.figures.Level, as plain values."""

    kind: str
    levels: Sequence[Mapping[str, Any]]

    @property
    def points(self) -> list[tuple[float, float]]:
        """Tokens per second and the median latency in seconds."""
        return [(level["tokens_per_second"], level["latency"]["p50"]) for level in self.levels]


def latency(curves: Mapping[str, Curve]) -> bytes:
    """The plot as a PNG of 1000 x 620 pixels. The same curves give the same bytes."""
    return as_png(lambda: draw(curves, title="Latency over throughput, by the number of requests at once"))


def latency_svg(curves: Mapping[str, Curve], narrow: bool) -> str:
    """The plot for an HTML page, whose CSS variables are its colours. narrow: for a phone."""
    name, size = ("latency-narrow", NARROW) if narrow else ("latency-wide", WIDE)
    return as_svg(lambda: draw(curves, size), name)


def draw(curves: Mapping[str, Curve], size: tuple[float, float] = WIDE, title: str = "") -> Figure:
    """The plot as a matplotlib figure with one pair of axes; the last texts of the axes are the labels."""
    figure, axes = empty_axes(size)
    _frame(axes, curves, title)
    seen: list[str] = []
    for curve in curves.values():
        _line(axes, curve, DASHES[seen.count(curve.kind) % len(DASHES)])
        seen.append(curve.kind)
    figure.draw_without_rendering()  # lays the figure out, so that the labels can be placed in pixels
    _labels(axes, curves, size[0] < ROOM)
    return figure


def _frame(axes: Axes, curves: Mapping[str, Curve], title: str) -> None:
    points = [point for curve in curves.values() for point in curve.points]
    speeds, seconds = [x for x, _ in points], [y for _, y in points]
    axes.set_yscale("log")
    axes.set_xlim(0, 1.12 * max(speeds))
    axes.set_ylim(min(seconds) / 1.4, max(seconds) * 1.4)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    frame(axes, "new tokens per second, more is better", "median seconds for a request, less is better", title, 14)


def _line(axes: Axes, curve: Curve, dashes: Any) -> None:
    x, y = zip(*curve.points, strict=True)
    axes.plot(x, y, color=LIGHT[curve.kind], linewidth=1.8, linestyle=dashes, zorder=2)
    axes.plot(
        x,
        y,
        color=LIGHT[curve.kind],
        linestyle="none",
        marker=MARKERS[curve.kind],
        markersize=7,
        markeredgecolor=LIGHT["paper"],
        markeredgewidth=1,
        zorder=3,
    )


def _labels(axes: Axes, curves: Mapping[str, Curve], narrow: bool) -> None:
    """Label each point with its concurrency, and the last one of a line also with the name."""
    texts, inks, x, y = [], [], [], []
    for name, curve in curves.items():
        for place, (level, point) in enumerate(zip(curve.levels, curve.points, strict=True)):
            last = place == len(curve.levels) - 1
            texts.append(
                f"{short(name) if narrow else name}, {level['concurrency']}" if last else str(level["concurrency"])
            )
            inks.append(LIGHT[curve.kind])
            x.append(point[0])
            y.append(point[1])
    drawn = [curve.points for curve in curves.values()]
    textalloc.allocate(
        axes,
        x,
        y,
        texts,
        x_scatter=x,
        y_scatter=y,
        scatter_sizes=[6] * len(x),  # type: ignore[list-item]  # numbers, despite its annotation
        x_lines=[[x for x, _ in line] for line in drawn],
        y_lines=[[y for _, y in line] for line in drawn],
        textsize=SMALL,
        textcolor=inks,
        linecolor=inks,
        linewidth=0.8,
        margin=0.004,  # shares of the frame
        max_distance=0.4,
        nbr_candidates=1500,
        path_effects=[withStroke(linewidth=3, foreground=LIGHT["paper"])],  # readable where a line crosses
        zorder=5,
    )
