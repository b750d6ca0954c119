"""The plot of latency over throughput: its points and labels, in colours of the page."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tasks.reporting.latency_plot import Curve, draw, latency, latency_svg
from tasks.reporting.palette import LIGHT

SPEEDS = {
    "base": ("baseline", [(57, 0.6), (100, 0.7), (170, 0.8), (250, 1.1)]),
    "int8": ("pass", [(63, 0.55), (110, 0.65), (190, 0.75)]),
    "gptq-int4-with-a-long-name": ("pass", [(43, 0.75), (80, 0.9)]),
}


def level(concurrency: int, speed: float, seconds: float) -> dict[str, object]:
    return {"concurrency": concurrency, "tokens_per_second": speed, "latency": {"p50": seconds}}


CURVES = {
    name: Curve(kind, [level(2**step, *point) for step, point in enumerate(points)])
    for name, (kind, points) in SPEEDS.items()
}


def test_every_point_is_drawn_and_labelled_by_its_concurrency() -> None:
    (axes,) = draw(CURVES).axes
    markers = [line for line in axes.lines if line.get_linestyle() == "None"]
    drawn = [np.transpose(np.asarray(line.get_data())).tolist() for line in markers]
    assert drawn == [[list(point) for point in points] for _, points in SPEEDS.values()]
    assert [line.get_color() for line in markers] == [LIGHT[kind] for kind, _ in SPEEDS.values()]
    labels = [text.get_text() for text in axes.texts if text.get_text()]
    assert sorted(labels) == sorted(
        ["1", "2", "4", "base, 8", "1", "2", "int8, 4", "1", "gptq-int4-with-a-long-name, 2"]
    )
    lines = [line for line in axes.lines if line.get_linewidth() > 1]
    dashes = [line.get_linestyle() for line in lines if line.get_linestyle() != "None"]
    assert dashes == ["-", "-", "--"]  # the second line of a colour is dashed


def test_the_same_curves_give_the_same_picture() -> None:
    assert latency(CURVES) == latency(CURVES)


@pytest.mark.parametrize("narrow", [False, True])
def test_the_svg_has_the_pages_colours_and_ids_of_its_own(narrow: bool) -> None:
    svg = latency_svg(CURVES, narrow)
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    assert "var(--pass)" in svg
    assert "var(--baseline)" in svg
    name = "latency-narrow" if narrow else "latency-wide"
    assert all(found.startswith(name) for found in re.findall(r'\sid="([^"]+)"', svg))
    assert ("gptq-int4-with-a-lo…, 2" if narrow else "gptq-int4-with-a-long-name, 2") in svg
