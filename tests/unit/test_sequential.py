"""The sequential gate: published critical values, error rates within the stated confidence, and a stable order."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from tasks.errors import TaskError
from tasks.reporting.verdict import judge, sequential_retention
from tasks.scoring.order import BLOCK, LOOKS, Order
from tasks.scoring.sequential import bounds, critical_values

EQUAL = (0.2, 0.4, 0.6, 0.8, 1.0)
ACCURACIES = (0.65, 0.45, 0.3)
ITEMS = 250  # per task
RUNS = 4000


def item_sets(runs: int, kept: float, gained: float, seed: int) -> np.ndarray:
    """float64 [runs, tasks, items, 2]: 0/1 scores of baseline and variant on the same items.

    The variant loses some of the baseline's right answers and gains others, so that its true retention per task is
    `kept`. gained: share of all items.
    """
    generator = np.random.default_rng(seed)
    accuracy = np.array(ACCURACIES)[None, :, None]
    right = generator.random((runs, len(ACCURACIES), ITEMS)) < accuracy
    flip = generator.random(right.shape)
    lost = (gained + (1 - kept) * accuracy) / accuracy
    return np.stack([right, np.where(right, flip >= lost, flip < gained / (1 - accuracy))], -1).astype(np.float64)


def verdict(scores: np.ndarray, gate: float, confidence: float = 0.95) -> tuple[str, int]:
    """The verdict for scores [tasks, items, 2], and its look."""
    for look in range(1, LOOKS + 1):
        pairs = {str(task): items[: ITEMS * look // LOOKS] for task, items in enumerate(scores)}
        found = bounds(pairs, EQUAL[:look], confidence)
        if found.at_least >= gate:
            return "pass", look
        if found.at_most < gate:
            return "fail", look
    return "inconclusive", LOOKS


class TestCriticalValues:
    @pytest.mark.parametrize(
        ("fractions", "error", "published"),
        [
            # from ldbounds and gsDesign, which were checked against Lan's and DeMets' own program
            (EQUAL, 0.025, (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)),
            ((0.5, 1.0), 0.025, (2.9626, 1.9686)),
            ((1.0,), 0.05, (1.6449,)),
        ],
    )
    def test_they_are_the_published_ones(
        self, fractions: tuple[float, ...], error: float, published: tuple[float, ...]
    ) -> None:
        assert critical_values(fractions, error) == pytest.approx(published, abs=2e-4)

    def test_all_looks_together_cross_as_often_as_the_error_says(self) -> None:
        fractions = (0.1, 0.45, 0.5, 1.0)
        steps = np.sqrt(np.diff((0.0, *fractions)))
        sums = np.cumsum(np.random.default_rng(1).standard_normal((400_000, 4)) * steps, axis=1)
        crossed = (sums / np.sqrt(fractions) > critical_values(fractions, 0.1)).any(axis=1).mean()
        assert crossed == pytest.approx(0.1, abs=0.002)

    def test_a_look_without_new_items_costs_nothing(self) -> None:
        values = critical_values((0.0, 0.5, 0.5, 1.0), 0.05)
        assert values[::2] == (math.inf, math.inf)
        assert values[1::2] == critical_values((0.5, 1.0), 0.05)


class TestErrorRates:
    @pytest.mark.parametrize(("gate", "gained"), [(0.9, 0.02), (0.95, 0.005), (0.9, 0.0)])
    def test_at_the_gate_each_wrong_verdict_is_as_rare_as_stated(self, gate: float, gained: float) -> None:
        said = Counter(verdict(scores, gate)[0] for scores in item_sets(RUNS, gate, gained, seed=2))
        # three standard errors of a 5% share in this number of runs
        most = 0.05 + 3 * math.sqrt(0.05 * 0.95 / RUNS)
        assert said["pass"] / RUNS <= most
        assert said["fail"] / RUNS <= most
        assert said["pass"] + said["fail"] > 0.02 * RUNS  # a gate without verdicts would satisfy any level

    def test_without_the_price_of_the_looks_it_would_not_hold(self) -> None:
        """The same simulation detects the error of five looks with a fixed-size bound."""
        wrong = 0
        for scores in item_sets(300, 0.9, 0.02, seed=2):
            looks = ({str(t): items[: ITEMS * k // LOOKS] for t, items in enumerate(scores)} for k in range(1, 6))
            wrong += any(bounds(pairs, (1.0,), 0.95).at_least >= 0.9 for pairs in looks)
        assert wrong / 300 > 0.08

    def test_clear_cases_are_decided_early(self) -> None:
        for kept, expected in ((1.0, "pass"), (0.6, "fail")):
            said = [verdict(scores, 0.9) for scores in item_sets(100, kept, 0.01, seed=3)]
            assert sum(what == expected for what, _ in said) >= 95
            assert np.mean([look for _, look in said]) < 3.5


class TestBounds:
    def test_nothing_that_differs_is_no_certainty(self) -> None:
        same = np.ones((50, 2))
        found = bounds({"t": same}, EQUAL[:1], 0.95)
        assert found.mean == 1
        assert found.low < found.at_least < 0.9
        assert found.high > found.at_most > 1.1

    def test_they_are_nested_and_narrow_with_the_looks(self) -> None:
        (scores,) = item_sets(1, 0.9, 0.02, seed=4)
        widths = []
        for look in range(1, 6):
            pairs = {str(t): items[: ITEMS * look // LOOKS] for t, items in enumerate(scores)}
            found = bounds(pairs, EQUAL[:look], 0.95)
            assert found.low < found.at_least < found.mean < found.at_most < found.high
            widths.append(found.high - found.low)
        assert widths == sorted(widths, reverse=True)

    def test_lost_answers_alone_have_wilsons_bound(self) -> None:
        scores = np.ones((400, 2))
        scores[:6, 1] = 0
        z = 1.6448536
        most = 6 + z**2 / 2 + z * math.sqrt(6 + z**2 / 4)  # share of lost answers
        assert bounds({"t": scores}, (1.0,), 0.95).at_least == pytest.approx(1 - most / 400, abs=2e-4)

    def test_a_baseline_without_a_point_bounds_nothing(self) -> None:
        found = bounds({"a": np.ones((9, 2)), "b": np.zeros((9, 2))}, EQUAL[:1], 0.95)
        assert (found.at_least, found.at_most) == (-math.inf, math.inf)


class TestOrder:
    def test_looks_are_equal_random_and_the_same_for_any_limit(self) -> None:
        small, large = Order(7, {"t": 2 * BLOCK}), Order(7, {"t": 20 * BLOCK})
        for look in range(1, LOOKS + 1):
            few, many = small.until(look)["t"], large.until(look)["t"]
            assert len(few) == 2 * BLOCK * look // LOOKS
            assert few == [item for item in many if item < 2 * BLOCK]
        first = np.array(large.until(1)["t"])
        assert abs(first.mean() - 10 * BLOCK) < 2 * BLOCK
        assert large.until(1) != Order(8, {"t": 20 * BLOCK}).until(1)

    def test_tasks_advance_together(self) -> None:
        order = Order(7, {"a": 250, "b": 73, "c": 3})
        assert order.fractions(5)[-1] == 1
        assert order.fractions(5) == pytest.approx(EQUAL, abs=0.03)

    def test_items_tell_their_look(self) -> None:
        order = Order(7, {"a": 250, "b": 73})
        assert [order.reached(order.until(look)) for look in range(1, 6)] == [1, 2, 3, 4, 5]
        part = order.until(3)
        part["b"] = part["b"][1:]
        with pytest.raises(TaskError, match="do not match any look"):
            order.reached(part)

    @pytest.mark.parametrize("record", [None, {"seed": 1}, {"seed": 1, "items": {}, "looks": 9, "block": 50}])
    def test_an_order_of_another_version_is_refused_with_a_command(self, record: object) -> None:
        with pytest.raises(TaskError, match="dvc repro -f reference, then dvc repro"):
            Order.read(record)


def test_the_verdict_is_the_one_that_stopped_the_scoring() -> None:
    order = Order(7, {"a": 250, "b": 250, "c": 250})
    for number, scores in enumerate(item_sets(40, 0.97, 0.01, seed=5)):
        for look in range(1, LOOKS + 1):
            had = order.until(look)
            pairs = {task: scores[i][had[task]] for i, task in enumerate(had)}
            found = bounds(pairs, order.fractions(look), 0.95)
            if found.at_least >= 0.9 or found.at_most < 0.9:
                break
        result = sequential_retention(pairs, had, order.record(), 0.95)
        assert (result.at_least, result.at_most) == (found.at_least, found.at_most), number
        expected = "pass" if found.at_least >= 0.9 else "fail" if found.at_most < 0.9 else "inconclusive"
        assert judge(result, 0.9).verdict == expected
