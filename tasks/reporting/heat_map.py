"""A heat map of the cost of each precision in each linear layer, with the chosen precisions marked."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tasks.reporting.pareto_plot import DARK, LIGHT
from tasks.schemes import NONE, parse_precision

PLACE = re.compile(r"\.layers\.(\d+)\.(.+)$")
WHOLE = 32  # bits per weight of an unquantized layer, at most
ROW, EDGE = 0.2, 1.1  # heights in inches: of a kind of layer, and of everything around the panels


def heat_map(linears: Sequence[Mapping[str, Any]], dark: bool = False) -> bytes:
    """Draw a PNG with a panel per precision, a row per kind of linear layer and a column per decoder layer.

    linears: `name`, `chosen` and `costs` of each layer (tasks/model/precisions.py). A dot marks the chosen precision.
    """
    colours = DARK if dark else LIGHT
    cells = {(int(found[1]), found[2]): one for one in linears if (found := PLACE.search(one["name"]))}
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    depth = 1 + max(layer for layer, _ in cells)
    labels = sorted({label for one in linears for label in one["costs"]}, key=_fineness)
    known = [cost for one in linears for cost in one["costs"].values() if cost > 0]
    with rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": colours["ink"]}):
        height = EDGE + len(labels) * (ROW * len(kinds) + 0.35)
        figure = Figure(figsize=(10, height), dpi=100, facecolor=colours["paper"], layout="constrained")
        FigureCanvasAgg(figure)
        panels = np.atleast_1d(figure.subplots(len(labels), 1, sharex=True))
        for axes, label in zip(panels, labels, strict=True):
            costs = np.full((len(kinds), depth), np.nan)
            for (layer, kind), one in cells.items():
                costs[kinds.index(kind), layer] = one["costs"].get(label, np.nan)
            norm = LogNorm(min(known), max(known)) if min(known) < max(known) else None
            image = axes.imshow(np.maximum(costs, min(known)), norm=norm, cmap="viridis", aspect="auto")
            chosen = [(at, kinds.index(kind)) for (at, kind), one in cells.items() if one["chosen"] == label]
            _dots(axes, chosen)
            _panel(axes, f"{_name(label)}: {len(chosen)} chosen", kinds, colours)
        panels[-1].set_xlabel("decoder layer", color=colours["ink"])
        bar = figure.colorbar(image, ax=list(panels), pad=0.01, aspect=40)
        bar.set_label("added divergence from the baseline (nats per token)", color=colours["ink"])
        bar.ax.tick_params(colors=colours["faint"])
        picture = io.BytesIO()
        figure.savefig(picture, format="png", facecolor=colours["paper"], metadata={"Software": None})
    return picture.getvalue()


def _fineness(label: str) -> tuple[int, float, str]:
    """Sort key, from the coarsest precision to the finest: W4A16_ASYM@128, W4A16_ASYM@64, W8A8, none."""
    scheme = parse_precision(label)
    if scheme is None:
        return WHOLE, 0, label
    return scheme.bits, -(scheme.group_size or math.inf), label


def _name(label: str) -> str:
    """W4A16_ASYM@64 -> W4A16_ASYM, groups of 64."""
    return "not quantized" if label == NONE else label.replace("@", ", groups of ")


def _dots(axes: Axes, places: Sequence[tuple[int, int]]) -> None:
    if places:
        axes.plot(*zip(*places, strict=True), "o", color="white", markersize=4, markeredgecolor="black")


def _panel(axes: Axes, title: str, kinds: Sequence[str], colours: Mapping[str, str]) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=colours["ink"])
    axes.set_yticks(range(len(kinds)), [kind.rpartition(".")[2] for kind in kinds])
    axes.set_facecolor(colours["grid"])  # shows where the group size does not divide the layer's width
    axes.tick_params(colors=colours["faint"], length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
