"""The statistics behind pass, fail and inconclusive."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from tasks.errors import TaskError
from tasks.reporting.verdict import (
    Retention,
    TaskRetention,
    flips,
    judge,
    mcnemar,
    pair_items,
    retention,
)


def records(*scores: float, start: int = 0) -> list[dict[str, Any]]:
    return [{"item": i, "hash": f"h{i}", "score": s} for i, s in enumerate(scores, start)]


def simulated(items: int, accuracy: float, lost: float, seed: int) -> np.ndarray:
    """0/1 scores [items, 2] where the variant loses a share `lost` of the baseline's right answers."""
    generator = np.random.default_rng(seed)
    right = generator.random(items) < accuracy
    return np.stack([right, right & (generator.random(items) >= lost)], axis=1).astype(float)


def result(mean: float, low: float, high: float, items: int = 400) -> Retention:
    tasks = {"t": TaskRetention(mean, low, high, 0.5, 0.5 * mean, items)}
    return Retention(mean, low - 0.01, high + 0.01, low, high, 0.95, tasks)


class TestPairing:
    def test_items_are_matched_by_id_whatever_their_order(self) -> None:
        pairs = pair_items("t", "v", records(1, 0, 0.5), records(0, 1, 0.25)[::-1])
        assert pairs.tolist() == [[1, 0], [0, 1], [0.5, 0.25]]

    def test_a_variant_may_have_fewer_items(self) -> None:
        pairs = pair_items("t", "v", records(1, 0, 1, 1), [*records(0, start=3), *records(1, start=1)])
        assert pairs.tolist() == [[0, 1], [1, 0]]

    @pytest.mark.parametrize(
        ("baseline", "scored", "message"),
        [
            (records(1, 0), records(1, 0, 1), r"task t: base has no result for item 2;"),
            (records(1), records(1) + records(1), r"task t: v has item 0 more than once"),
            (records(1, 1, start=7) * 2, records(1), r"task t: base has item 7, 8 more than once"),
            (
                records(1, 0),
                [*records(1), {"item": 1, "hash": "x", "score": 0}],
                r"item 1 was a different question",
            ),
            (records(1), records(1.5), r"v has a score outside 0 to 1 for item 0"),
            (records(1), records(float("nan")), r"v has a score outside 0 to 1 for item 0"),
            (records(1), [], r"task t: v has no items"),
            (records(1), records(*[1] * 9), r"base has no result for item 1, 2, 3, 4, 5 and 3 more"),
        ],
    )
    def test_what_does_not_match_is_refused_by_name(self, baseline: Any, scored: Any, message: str) -> None:
        with pytest.raises(TaskError, match=message):
            pair_items("t", "v", baseline, scored)


class TestRetention:
    def test_identical_results_have_an_interval_without_width(self) -> None:
        scores = simulated(300, 0.6, 0, seed=1)
        same = retention({"a": scores, "b": scores[:50]}, 0.95, 500)
        assert (same.mean, same.low, same.high) == (1, 1, 1)
        assert judge(same, 1.0).verdict == "pass"

    def test_the_estimate_is_the_mean_of_the_tasks_ratios(self) -> None:
        a = np.array([[1, 1], [1, 0], [0, 0], [0, 1.0]] * 30)
        b = np.array([[1, 1], [1, 0.5]] * 30)
        found = retention({"a": a, "b": b}, 0.9, 200)
        assert found.tasks["a"].retention == 1
        assert found.tasks["b"].retention == 0.75
        assert found.mean == 0.875
        assert found.low < 0.875 < found.high
        assert found.tasks["a"].items == 120

    def test_pairing_makes_the_interval_narrow(self) -> None:
        paired = simulated(400, 0.5, 0.02, seed=2)
        # the same scores, no longer paired by item
        apart = np.stack([paired[:, 0], np.random.default_rng(3).permutation(paired[:, 1])], axis=1)
        narrow, wide = (retention({"t": s}, 0.95, 2000) for s in (paired, apart))
        assert narrow.mean == wide.mean
        assert (wide.high - wide.low) > 4 * (narrow.high - narrow.low)

    def test_the_interval_agrees_with_the_normal_approximation(self) -> None:
        scores = simulated(2000, 0.5, 0.1, seed=4)
        found = retention({"t": scores}, 0.95, 5000)
        base, variant = scores.T
        ratio = variant.mean() / base.mean()
        # delta method for a ratio of paired means
        error = np.std(variant - ratio * base) / base.mean() / np.sqrt(len(scores))
        assert found.low == pytest.approx(ratio - 1.96 * error, abs=0.003)
        assert found.high == pytest.approx(ratio + 1.96 * error, abs=0.003)

    def test_the_interval_covers_the_truth_as_often_as_it_says(self) -> None:
        hits = 0
        for seed in range(200):
            found = retention({"t": simulated(300, 0.5, 0.1, seed=1000 + seed)}, 0.9, 400)
            hits += found.low <= 0.9 <= found.high
        assert 0.84 <= hits / 200 <= 0.96

    def test_same_seed_same_numbers_and_tasks_in_any_order(self) -> None:
        a, b = simulated(60, 0.5, 0.2, 5), simulated(90, 0.7, 0.1, 6)
        assert retention({"a": a, "b": b}, 0.95, 300) == retention({"b": b, "a": a}, 0.95, 300)

    def test_chunks_do_not_change_the_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pairs = {"t": simulated(70, 0.5, 0.2, 7)}
        whole = retention(pairs, 0.95, 300)
        monkeypatch.setattr("tasks.reporting.verdict.CHUNK_BYTES", 8 * 70 * 11)
        assert retention(pairs, 0.95, 300) == whole

    def test_it_is_fast_enough(self) -> None:
        pairs = {f"t{i}": simulated(500, 0.5, 0.1, i) for i in range(4)}
        started = time.process_time()
        retention(pairs, 0.95, 10_000)
        assert time.process_time() - started < 2

    @pytest.mark.parametrize(
        ("pairs", "message"),
        [
            ({}, "no task to compare"),
            ({"t": np.empty((0, 2))}, "task t has no items"),
            ({"t": np.zeros((9, 2))}, "task t: the baseline scores 0 on 9 items"),
            ({"t": np.array([[1.0, 1.0]] + [[0.0, 1.0]] * 99)}, "has only 1 points on 100 items, too few"),
        ],
    )
    def test_nothing_to_divide_by_is_an_error(self, pairs: dict[str, np.ndarray], message: str) -> None:
        with pytest.raises(TaskError, match=message):
            retention(pairs, 0.95, 1000)


class TestVerdict:
    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [
            (0.95, 0.99, "pass"),
            (0.96, 1.02, "pass"),
            (0.9499, 0.99, "inconclusive"),
            (0.90, 0.95, "inconclusive"),
            (0.90, 0.9499, "fail"),
        ],
    )
    def test_the_bounds_decide(self, low: float, high: float, verdict: str) -> None:
        assert judge(result((low + high) / 2, low, high), 0.95).verdict == verdict

    def test_the_reason_shows_on_which_side_the_number_lies(self) -> None:
        reason = judge(result(0.93, 0.91, 0.94996), 0.95).reason
        assert reason == "it keeps at most 94.996% with 95% confidence, and the gate is 95%"

    def test_a_quarter_of_the_width_needs_sixteen_times_the_items(self) -> None:
        # 4 points of half width, 1 point of distance
        verdict = judge(result(0.96, 0.92, 1.0, items=100), 0.95)
        assert verdict.items_needed == 1600
        assert "about 1,600 items per task instead of 100 would decide" in verdict.reason

    def test_a_variant_at_the_gate_passes_as_seldom_as_the_confidence_says(self) -> None:
        # the true retention is the gate, 95%: each one-sided test may be wrong 5% of the time
        verdicts = [
            judge(retention({"t": simulated(400, 0.6, 0.05, seed=s)}, 0.95, 500), 0.95).verdict for s in range(300)
        ]
        assert 0.01 < verdicts.count("pass") / 300 < 0.10
        assert 0.01 < verdicts.count("fail") / 300 < 0.10

    def test_the_items_needed_do_decide(self) -> None:
        few = {"t": simulated(300, 0.6, 0.07, seed=8)}
        first = retention(few, 0.95, 2000)
        needed = judge(first, 0.95)
        assert needed.verdict == "inconclusive"
        assert needed.items_needed is not None
        again = np.tile(few["t"], (1 + needed.items_needed // 300, 1))
        assert judge(retention({"t": again}, 0.95, 2000), 0.95).verdict != "inconclusive"

    @pytest.mark.parametrize("mean", [0.95, 0.9501, 0.9499])
    def test_too_near_the_gate_is_said_honestly(self, mean: float) -> None:
        verdict = judge(result(mean, 0.93, 0.97), 0.95)
        assert verdict.items_needed is None
        assert "too close to the gate for any practical number of items to decide" in verdict.reason


class TestFlips:
    def test_lost_and_gained_are_counted_over_all_tasks(self) -> None:
        pairs = {"a": np.array([[1, 0], [1, 0], [0, 1], [1, 1.0]]), "b": np.array([[0.5, 0.25], [0, 0]])}
        assert (flips(pairs).lost, flips(pairs).gained) == (3, 1)

    @pytest.mark.parametrize(
        ("lost", "gained", "p_value"),
        [
            (0, 0, 1.0),
            (1, 1, 1.0),
            (5, 0, 2 / 32),
            (0, 5, 2 / 32),
            (1, 5, 2 * (1 + 6) / 64),
            (15, 5, 0.041389465),  # scipy.stats.binomtest(5, 20).pvalue
        ],
    )
    def test_mcnemar_is_the_exact_binomial(self, lost: int, gained: int, p_value: float) -> None:
        assert mcnemar(lost, gained) == pytest.approx(p_value)

    def test_mcnemar_of_many_items_does_not_overflow(self) -> None:
        assert mcnemar(6000, 7000) == pytest.approx(1.85e-18, rel=0.01)
        assert mcnemar(20000, 0) == 0
