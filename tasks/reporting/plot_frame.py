"""What the plots share: sizes, frame, and how a figure becomes a PNG, or an SVG inside the page."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tasks.reporting.inline_svg import inline_svg
from tasks.reporting.palette import LIGHT

FONT_SIZE = 10.5
WIDE, NARROW = (10, 6.2), (4.0, 4.6)  # inches
ROOM = 6  # inches in which a legend fits on one line, and labels have figures
_STYLE: Any = {"font.family": "DejaVu Sans", "font.size": FONT_SIZE}


def as_png(draw: Callable[[], Figure]) -> bytes:
    """The figure as a PNG with 100 pixels an inch. The same figure gives the same bytes."""
    picture = io.BytesIO()
    with rc_context(_STYLE):
        figure = draw()
        figure.savefig(picture, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return picture.getvalue()


def as_svg(draw: Callable[[], Figure], name: str) -> str:
    """The figure for an HTML page, whose CSS variables are its colours. name: see `inline_svg`."""
    with rc_context(_STYLE):
        return inline_svg(draw(), name, LIGHT)


def empty_axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A new figure and its only axes. size: inches."""
    figure = Figure(figsize=size, dpi=100, facecolor=LIGHT["paper"], layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def frame(axes: Axes, x: str, y: str, title: str, pad: float) -> None:
    """Two spines, a grid below all else, and the labels of the axes. pad: points below the title, if there is one."""
    axes.set_facecolor(LIGHT["paper"])
    axes.grid(color=LIGHT["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LIGHT["faint"])
    axes.tick_params(which="both", colors=LIGHT["faint"])
    axes.set_xlabel(x, color=LIGHT["ink"], labelpad=8)
    axes.set_ylabel(y, color=LIGHT["ink"], labelpad=8)
    if title:
        axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=pad, color=LIGHT["ink"])
