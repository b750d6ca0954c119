"""Sequential gate: items are scored in looks, and scoring stops as soon as the verdict is certain.

All tasks advance together. After each look, the retention (mean over tasks of score / baseline's score) gets confidence
bounds that hold at all looks simultaneously. So the error rate of a verdict stays within the stated confidence, no
matter when or why scoring stops. The error spent is small at the first looks and largest at the last.

C. Jennison and B. W. Turnbull, Interim analyses: the repeated confidence interval approach, J. R. Stat. Soc. B 51,
1989 (the bounds); K. K. G. Lan and D. L. DeMets, Biometrika 70, 1983 (spending); P. C. O'Brien and T. R. Fleming,
Biometrics 35, 1979 (the shape of spending); P. Armitage, C. K. McPherson and B. C. Rowe, J. R. Stat. Soc. A 132, 1969
(the recursion); E. B. Wilson, J. Am. Stat. Assoc. 22, 1927, and P. Hall, J. R. Stat. Soc. B 54, 1992 (few and skewed
items).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Pairs = Mapping[str, np.ndarray]

_NORMAL = NormalDist()
_FARTHEST = 8.0  # standard deviations; the tail beyond has a probability below 1e-15
_POINTS = 401  # per density, odd for Simpson's rule; doubling them changes a critical value by less than 1e-6


@dataclass(frozen=True)
class Bounds:
    """A retention and its bounds. low, high: two-sided; at_least, at_most: one-sided, each at the same confidence."""

    mean: float
    low: float
    high: float
    at_least: float
    at_most: float


def bounds(pairs: Pairs, fractions: Sequence[float], confidence: float) -> Bounds:
    """The retention's repeated confidence bounds at the last look of `fractions`.

    pairs: float64 [items, 2] per task: scores of baseline and variant on all items up to that look.
    fractions: cumulative share of the planned items after each look, increasing, at most 1.
    If the baseline scores zero on a task, the retention is NaN and the bounds are infinite.
    """
    if not all(scores[:, 0].any() for scores in pairs.values()):
        return Bounds(math.nan, -math.inf, math.inf, -math.inf, math.inf)
    found = _moments(pairs)
    one, two = (critical_values(tuple(fractions), (1 - confidence) / sides)[-1] for sides in (1, 2))
    return Bounds(
        found.mean,
        found.mean - found.reach(two, -1),
        found.mean + found.reach(two, 1),
        found.mean - found.reach(one, -1),
        found.mean + found.reach(one, 1),
    )


@dataclass(frozen=True)
class _Moments:
    """mean, variance, third: moments of the estimate. answer: the weight in it of one answer, in the task with the
    lowest total score of the baseline."""

    mean: float
    variance: float
    third: float
    answer: float

    def reach(self, critical: float, side: int) -> float:
        """Distance from the estimate to its bound on a `side` (1: above, -1: below): `critical` standard errors,
        widened for few or skewed items.

        If only lost answers vary, this is Wilson's score bound on their number (Poisson). It accounts for losses that
        were missed by chance, so it is not zero even if no answer was lost.
        """
        if math.isinf(critical):
            return math.inf
        unseen = critical**2 / 4
        variance = self.variance + unseen * self.answer**2
        skew = max(0.0, side * self.third) + unseen * self.answer**3
        return critical * math.sqrt(variance) + critical**2 / 2 * skew / variance


def _moments(pairs: Pairs) -> _Moments:
    """Moments by the delta method: an item's influence on a ratio of means is (v - ratio * b) / sum of b."""
    mean = variance = third = 0.0
    for scores in pairs.values():
        baseline, variant = scores.T
        points = float(baseline.sum())
        ratio = float(variant.sum()) / points
        influence = (variant - ratio * baseline) / (points * len(pairs))
        mean += ratio / len(pairs)
        variance += float((influence**2).sum()) * len(scores) / max(len(scores) - 1, 1)
        third += float((influence**3).sum())
    least = min(float(scores[:, 0].sum()) for scores in pairs.values())
    return _Moments(mean, variance, third, 1 / (len(pairs) * least))


@lru_cache(maxsize=256)
def critical_values(fractions: tuple[float, ...], error: float) -> tuple[float, ...]:
    """One-sided critical values of a standard normal statistic, one per look.

    The statistics at information fractions s < t have correlation sqrt(s / t). The probability of exceeding a critical
    value at any look up to t equals the error spent by t: 2 - 2 Phi(z / sqrt(t)), where z is the quantile of
    1 - error / 2. A look without new items spends nothing; its critical value is infinite.
    """
    quantile = _NORMAL.inv_cdf(1 - error / 2)
    values: list[float] = []
    density: NDArray[np.float64] | None = None  # of the sum, if no look has crossed: at `places`
    places = np.zeros(1)
    weights = np.ones(1)
    before = spent = 0.0
    for fraction in fractions:
        step = fraction - before
        due = 2 - 2 * _NORMAL.cdf(quantile / math.sqrt(fraction)) - spent if step > 0 else 0.0
        if due <= 0:
            values.append(math.inf)
            continue
        mass = weights if density is None else weights * density
        limit = _crossed(places, mass, math.sqrt(step), due, fraction)
        values.append(limit / math.sqrt(fraction))
        after = np.linspace(-_FARTHEST * math.sqrt(fraction), limit, _POINTS)
        steps = (after[:, None] - places[None, :]) / math.sqrt(step)
        density = (np.exp(-(steps**2) / 2) / math.sqrt(2 * math.pi * step)) @ mass
        places, weights = after, _simpson(after)
        before, spent = fraction, spent + due
    return tuple(values)


def _crossed(
    places: NDArray[np.float64], mass: NDArray[np.float64], deviation: float, due: float, fraction: float
) -> float:
    """The limit that the next sum exceeds with probability `due`, by bisection."""
    low, high = -_FARTHEST * math.sqrt(fraction), _FARTHEST * math.sqrt(fraction)
    for _ in range(60):
        middle = (low + high) / 2
        beyond = float(_upper_tail((middle - places) / deviation) @ mass)
        low, high = (middle, high) if beyond > due else (low, middle)
    return (low + high) / 2


def _upper_tail(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probability that a standard normal variable exceeds z."""
    return np.array([math.erfc(value / math.sqrt(2)) / 2 for value in z.tolist()])


def _simpson(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights of Simpson's rule for an odd number of evenly spaced places."""
    weights: NDArray[np.float64] = np.full(len(places), 2.0)
    weights[1::2] = 4.0
    weights[0] = weights[-1] = 1.0
    weights *= (places[1] - places[0]) / 3
    return weights
