"""A matplotlib figure as SVG inside an HTML page: its colours are the page's CSS variables, its text is text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text

_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
# the page has the fonts, and these rules would apply to all of it
_LEFT_OUT = re.compile(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", re.DOTALL)
_FONT = re.compile(r" ?font-family: [^;\"]*;?")
_SIZE = re.compile(r'^<svg [^>]*?viewBox="(?P<box>[^"]+)"[^>]*>')


def inline_svg(figure: Figure, name: str, colours: Mapping[str, str]) -> str:
    """The figure without XML prolog, size and metadata; the same figure gives the same text.

    name: distinguishes the ids of the page's figures. colours: variable -> the colour #rrggbb in the figure that it
    replaces.
    """
    for text in figure.findobj(Text):
        text.set_path_effects([])  # which would turn it into outlines; the page's style has the halo
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", facecolor="none", metadata=_METADATA)
    svg = file.getvalue()
    svg = _FONT.sub("", _LEFT_OUT.sub("", svg[svg.index("<svg") :]))
    svg = _SIZE.sub(lambda found: f'<svg viewBox="{found["box"]}" aria-hidden="true" focusable="false">', svg)
    svg = re.sub(r'(\sid=|xlink:href=|url\()("?#?)', lambda found: f"{found[1]}{found[2]}{name}-", svg)
    svg = svg.replace("xlink:href=", "href=")
    for variable, colour in colours.items():
        svg = re.sub(colour, f"var(--{variable})", svg, flags=re.IGNORECASE)
    return re.sub(r"\n\s*", "\n", svg).strip()
