"""Precisions within a budget: never beyond it, and optimal."""

from __future__ import annotations

import itertools

import pytest
import torch

from tasks.errors import TaskError
from tasks.solvers.allocate import Cost, least_error, least_size

COARSE, MIDDLE, FINE = LABELS = ("W4A16_ASYM@64", "W4A16_ASYM@32", "W8A16@64")
Table = dict[int, dict[str, Cost]]


def made_up(units: int, seed: int) -> Table:
    random = torch.Generator().manual_seed(seed)
    table: Table = {}
    for unit in range(units):
        weights, error = (float(torch.rand(1, generator=random)) + 0.1 for _ in range(2))
        bits = {COARSE: 4.25, MIDDLE: 4.5, FINE: 8.25}
        table[unit] = {label: Cost(error * 0.9 ** (10 * bits[label]), 1000 * weights * bits[label]) for label in LABELS}
    return table


def total(table: Table, chosen: dict[int, str]) -> Cost:
    costs = [table[unit][label] for unit, label in chosen.items()]
    return Cost(sum(cost.error for cost in costs), sum(cost.bits for cost in costs))


@pytest.mark.parametrize("seed", range(4))
def test_choice_is_optimal(seed: int) -> None:
    table = made_up(6, seed)
    every = [total(table, dict(enumerate(choice))) for choice in itertools.product(LABELS, repeat=len(table))]
    allowed = sorted(cost.bits for cost in every)[len(every) // 3]
    found = total(table, least_error(table, allowed))
    assert found.bits <= allowed * 1.000001
    assert found.error == pytest.approx(min(cost.error for cost in every if cost.bits <= allowed))
    tolerated = sorted(cost.error for cost in every)[len(every) // 3]
    found = total(table, least_size(table, tolerated))
    assert found.error <= tolerated * 1.000001
    assert found.bits == pytest.approx(min(cost.bits for cost in every if cost.error <= tolerated))


def test_choice_is_independent_of_order() -> None:
    table = made_up(100, 1)
    allowed = 1.1 * total(table, dict.fromkeys(table, COARSE)).bits
    assert least_error(dict(reversed(table.items())), allowed) == least_error(table, allowed)


def test_smallest_choices_fit_exactly_and_a_smaller_budget_is_refused() -> None:
    table = made_up(20, 2)
    smallest = total(table, dict.fromkeys(table, COARSE)).bits
    assert set(least_error(table, smallest).values()) == {COARSE}
    with pytest.raises(TaskError, match="the smallest choice takes"):
        least_error(table, 0.99 * smallest)
    best = total(table, dict.fromkeys(table, FINE)).error
    with pytest.raises(TaskError, match="the best choice has an error of"):
        least_size(table, 0.99 * best)
