"""Plot of the benchmark: time and perplexity of each contender."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.table import Row

OURS, SHARED, THEIRS = "#0072B2", "#9ecae1", "#8c959f"
WORST = 0.5  # relative perplexity change at which a bar is cut off


def picture(field: Sequence[Row]) -> bytes:
    """A PNG with two bar charts, one row per contender."""
    figure = Figure(figsize=(11, 0.55 * len(field) + 1.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    time, loss = figure.subplots(1, 2, sharey=True)
    names = [row.name for row in field]
    colours = [OURS if row.shared else THEIRS for row in field]
    time.barh(names, [row.seconds for row in field], color=colours)
    time.barh(names, [row.shared for row in field], left=[row.seconds for row in field], color=SHARED)
    for index, row in enumerate(field):
        time.text(row.seconds + row.shared, index, f" {row.seconds:.0f} s", va="center", fontsize=9)
    time.set_title("seconds to quantize (light: the pass shared by ours)", fontsize=10, loc="left")
    time.invert_yaxis()
    mean = [sum(row.change.values()) / len(row.change) for row in field]
    loss.barh(names, [100 * min(value, WORST) for value in mean], color=colours)
    for index, value in enumerate(mean):
        beyond = f" {100 * value:+.1f}%" if value < WORST else f" {100 * value:+.2g}%, cut off"
        loss.text(100 * min(value, WORST), index, beyond, va="center", fontsize=9)
    loss.set_title("perplexity above the baseline's, mean over the texts (%)", fontsize=10, loc="left")
    for axes in (time, loss):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.18)
    found = io.BytesIO()
    figure.savefig(found, format="png", metadata={"Software": None})
    return found.getvalue()
