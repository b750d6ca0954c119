"""Pass, fail or inconclusive: a paired test of a variant against the baseline, item by item.

Baseline and variant answer the same items, so most of the random variation between items cancels out. The bootstrap
preserves this: it draws items, and scores both models on the same draw.
If scoring stopped early, the bounds account for it (tasks/scoring/sequential.py).
B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals);
Q. McNemar, Psychometrika 12, 1947 (the test for changed items), in its exact binomial form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tasks.errors import TaskError
from tasks.reporting.number_format import percent_beside, short_percent
from tasks.scoring.order import Order
from tasks.scoring.sequential import Pairs, bounds

SEED = 20130
MANY_ITEMS = 20_000  # few tasks have more items, so a higher recommendation would not be practical
CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class TaskRetention:
    """One task: mean scores (0 to 1) of baseline and variant over `items` items, their ratio and its interval."""

    retention: float
    low: float
    high: float
    baseline: float
    score: float
    items: int


@dataclass(frozen=True)
class Retention:
    """The mean over tasks of score(variant) / score(baseline), with its interval, and the result of each task.

    low, high: the two-sided interval at `confidence`. at_least, at_most: one-sided bounds, each at `confidence`.
    """

    mean: float
    low: float
    high: float
    at_least: float
    at_most: float
    confidence: float
    tasks: dict[str, TaskRetention]


@dataclass(frozen=True)
class Flips:
    """Numbers of items lost and gained against the baseline, with the two-sided exact McNemar p-value."""

    lost: int
    gained: int
    p_value: float


@dataclass(frozen=True)
class Verdict:
    """items_needed: items per task that would decide an inconclusive verdict; None if no practical number would."""

    verdict: Literal["pass", "fail", "inconclusive"]
    reason: str
    items_needed: int | None = None


def pair_items(
    task: str, variant: str, baseline: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Match lists of {"item", "hash", "score"} by item; float64 [items, 2]: scores of baseline and variant.

    The pairs cover the variant's items, sorted by id; the baseline may have more. Raises TaskError if there are no
    items, or if an item occurs twice, is missing in the baseline, has a different hash (the questions differed), or has
    a score outside 0 to 1. The message has the ids of the items.
    """
    ours, theirs = _by_item(task, "base", baseline), _by_item(task, variant, scored)
    again = f"evaluate base and {variant} again"
    if missing := sorted(theirs.keys() - ours.keys()):
        raise TaskError(f"task {task}: base has no result for item {_few(missing)}; {again}")
    other = sorted(i for i in theirs if ours[i][0] != theirs[i][0])
    if other:
        raise TaskError(
            f"task {task}: item {_few(other)} was a different question for {variant} than for base "
            f"(the hashes differ); {again}"
        )
    return np.array([(ours[i][1], theirs[i][1]) for i in sorted(theirs)], dtype=np.float64)


def retention(pairs: Pairs, confidence: float, resamples: int, seed: int = SEED) -> Retention:
    """The retention with its percentile bootstrap interval.

    pairs: float64 [items, 2] per task. Each of `resamples` rounds draws items of each task with replacement, the same
    items for baseline and variant. Raises TaskError if the baseline's score is zero in a task, or so low that a round
    draws no item with a score.
    """
    if not pairs:
        raise TaskError("no task to compare; name at least one in evaluation.tasks")
    generator = np.random.default_rng(seed)
    tail = 100 * (1 - confidence) / 2
    total = np.zeros(resamples)
    tasks = {}
    for task in sorted(pairs):
        scores = pairs[task]
        _check_baseline(task, scores)
        baseline, score = scores.mean(axis=0)
        ratios = _bootstrap(task, scores, resamples, generator)
        low, high = np.percentile(ratios, (tail, 100 - tail))
        tasks[task] = TaskRetention(
            float(score / baseline), float(low), float(high), float(baseline), float(score), len(scores)
        )
        total += ratios
    mean = sum(t.retention for t in tasks.values()) / len(tasks)
    low, high = np.percentile(total / len(tasks), (tail, 100 - tail))
    at_least, at_most = np.percentile(total / len(tasks), (2 * tail, 100 - 2 * tail))
    return Retention(mean, float(low), float(high), float(at_least), float(at_most), confidence, tasks)


def sequential_retention(
    pairs: Pairs, had: Mapping[str, Collection[int]], order: Mapping[str, Any] | None, confidence: float
) -> Retention:
    """The retention with bounds that are valid when scoring stops at any look; see `tasks.scoring.sequential`.

    had: the ids of each task's items in `pairs`; order: from the contract. Raises TaskError if the items do not match a
    look, or if the baseline's score on a task is zero.
    """
    planned = Order.read(order)
    fractions = planned.fractions(planned.reached(had))
    for task, scores in pairs.items():
        _check_baseline(task, scores)
    tasks = {}
    for task, scores in sorted(pairs.items()):
        own = bounds({task: scores}, fractions, confidence)
        baseline, score = scores.mean(axis=0)
        tasks[task] = TaskRetention(own.mean, own.low, own.high, float(baseline), float(score), len(scores))
    found = bounds(pairs, fractions, confidence)
    return Retention(found.mean, found.low, found.high, found.at_least, found.at_most, confidence, tasks)


def flips(pairs: Pairs) -> Flips:
    """Count the items of all tasks that scored lower (lost) or higher (gained) than the baseline."""
    lost = sum(int((scores[:, 1] < scores[:, 0]).sum()) for scores in pairs.values())
    gained = sum(int((scores[:, 1] > scores[:, 0]).sum()) for scores in pairs.values())
    return Flips(lost, gained, mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact McNemar p-value, under the hypothesis that losses and gains are equally likely."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def judge(result: Retention, gate: float) -> Verdict:
    """Two one-sided tests: pass if the lower bound reaches `gate`, fail if the upper bound is below it, else
    inconclusive.

    The bounds are one-sided, because a two-sided interval would spend half of the allowed error on the irrelevant side.
    """
    wanted, sure = short_percent(gate), f"with {short_percent(result.confidence)} confidence"
    low, high = percent_beside(result.at_least, gate), percent_beside(result.at_most, gate)
    if result.at_least >= gate:
        return Verdict("pass", f"it keeps at least {low} {sure}, and the gate is {wanted}")
    if result.at_most < gate:
        return Verdict("fail", f"it keeps at most {high} {sure}, and the gate is {wanted}")
    mean = percent_beside(result.mean, gate)
    open_question = (
        f"it keeps at least {low} and at most {high}, each {sure}, and the gate of {wanted} lies between them"
    )
    now = sum(t.items for t in result.tasks.values()) / len(result.tasks)
    factor = _more_items(result, gate)
    if factor is None or factor * now > MANY_ITEMS:
        near = f"the estimate of {mean} is too close to the gate for any practical number of items to decide"
        return Verdict("inconclusive", f"{open_question}, and {near}")
    needed = _two_digits(factor * now)
    remedy = f"about {needed:,} items per task instead of {now:,.0f} would decide, if the estimate of {mean} holds"
    return Verdict("inconclusive", f"{open_question}; {remedy}", needed)


def _check_baseline(task: str, scores: np.ndarray) -> None:
    if len(scores) == 0:
        raise TaskError(f"task {task} has no items; raise evaluation.limit or check the task's data")
    if not scores[:, 0].any():
        raise TaskError(
            f"task {task}: the baseline scores 0 on {len(scores)} items, so there is nothing to retain; "
            "remove the task from evaluation.tasks or raise evaluation.limit"
        )


def _more_items(result: Retention, gate: float) -> float | None:
    """The factor by which more items move the nearer bound to the gate; its distance is ~ 1 / sqrt(n)."""
    distance = abs(result.mean - gate)
    half = result.mean - result.at_least if result.mean >= gate else result.at_most - result.mean
    # with skewed items, the estimate can lie outside its interval; then the factor is unknown
    return None if distance == 0 or half <= 0 else max(1.0, (half / distance) ** 2)


def _two_digits(value: float) -> int:
    """Round up to two significant digits, because the value is only an estimate."""
    unit = int(10 ** max(0, math.floor(math.log10(value)) - 1))
    return math.ceil(value / unit) * unit


def _bootstrap(task: str, scores: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Ratios of the sums over items drawn with replacement, in bounded memory: float64 [resamples]."""
    items = len(scores)
    baseline, variant = np.ascontiguousarray(scores.T)
    rows = max(1, CHUNK_BYTES // (8 * items))
    ratios = np.empty(resamples)
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, items, size=(min(rows, resamples - start), items))
        below = baseline[drawn].sum(axis=1)
        if not below.all():
            raise TaskError(
                f"task {task}: the baseline has only {scores[:, 0].sum():g} points on {items} items, too few "
                "for an interval; raise evaluation.limit or remove the task"
            )
        ratios[start : start + len(drawn)] = variant[drawn].sum(axis=1) / below
    return ratios


def _by_item(task: str, name: str, records: Sequence[Mapping[str, Any]]) -> dict[Any, tuple[str, float]]:
    if not records:
        raise TaskError(f"task {task}: {name} has no items; evaluate {name} again")
    twice = sorted(i for i, count in Counter(r["item"] for r in records).items() if count > 1)
    if twice:
        raise TaskError(f"task {task}: {name} has item {_few(twice)} more than once; evaluate {name} again")
    # `not` also catches NaN
    wrong = sorted(r["item"] for r in records if not 0 <= r["score"] <= 1)
    if wrong:
        raise TaskError(
            f"task {task}: {name} has a score outside 0 to 1 for item {_few(wrong)}; "
            "choose a metric with that range for the task"
        )
    return {r["item"]: (r["hash"], float(r["score"])) for r in records}


def _few(values: Sequence[Any], most: int = 5) -> str:
    text = ", ".join(str(v) for v in values[:most])
    return text if len(values) <= most else f"{text} and {len(values) - most} more"
