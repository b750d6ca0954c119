"""The colours of plots and page, by what they mean, on light and on dark paper.

Based on M. Okabe and K. Ito's palette for colour-blind readers. Text has a contrast of at least 4.5 on its paper
(tests/functional/test_page.py).
"""

KINDS = ("pass", "fail", "inconclusive", "baseline")
_NAMES = (*KINDS, "ink", "faint", "paper", "grid", "front", "back", "line", "heat", "mark")
_LIGHT = ("#0069a3", "#b54708", "#8a5f00", "#444c56", "#1f2328", "#57606a", "#ffffff", "#e6e9ed", "#9aa4af")
_DARK = ("#56b4e9", "#f0803c", "#e6b422", "#d0d7de", "#e6edf3", "#9aa2ab", "#161b22", "#2a313a", "#5b6570")
LIGHT = dict(zip(_NAMES, (*_LIGHT, "#f5f6f8", "#dde1e6", "#c2410c", "#fff3c4"), strict=True))
DARK = dict(zip(_NAMES, (*_DARK, "#0d1117", "#2d343d", "#fb923c", "#4a3f14"), strict=True))
