"""Assign a precision to each part of a model, minimizing total error within a size or size within an error.

A model's loss is nearly linear in the relative errors of its layers (HIGGS, arXiv 2411.17525). The search is exact: an
integer linear program, solved by HiGHS (https://highs.dev).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from tasks.errors import TaskError

Unit = TypeVar("Unit", bound=Hashable)
Choice = TypeVar("Choice", bound=Hashable)


@dataclass(frozen=True)
class Cost:
    """The cost of one part at one precision. error: additive, any unit; bits: on disk, with scales and zero points."""

    error: float
    bits: float


def least_error(table: Mapping[Unit, Mapping[Choice, Cost]], bits: float) -> dict[Unit, Choice]:
    """Choose for each unit so that the sum of errors is minimal with at most `bits` in total, to a millionth.
    Deterministic. TaskError if even the smallest choices take more."""
    smallest = sum(min(cost.bits for cost in costs.values()) for costs in table.values())
    if smallest > bits:
        raise TaskError(f"the smallest choice takes {smallest:.0f} bits, but {bits:.0f} are allowed")
    return _choose(table, "error", "bits", bits)


def least_size(table: Mapping[Unit, Mapping[Choice, Cost]], error: float) -> dict[Unit, Choice]:
    """Choose for each unit so that the sum of bits is minimal with a total error of at most `error`. TaskError if even
    the best choices have more."""
    best = sum(min(cost.error for cost in costs.values()) for costs in table.values())
    if best > error:
        raise TaskError(f"the best choice has an error of {best:.4g}, but {error:.4g} is allowed")
    return _choose(table, "bits", "error", error)


def _choose(table: Mapping[Unit, Mapping[Choice, Cost]], least: str, limited: str, limit: float) -> dict[Unit, Choice]:
    columns = [(row, choice, cost) for row, costs in enumerate(table.values()) for choice, cost in costs.items()]
    target, weight = (np.array([getattr(cost, key) for _, _, cost in columns]) for key in (least, limited))
    one_each = np.zeros((len(table), len(columns)))
    one_each[[row for row, _, _ in columns], range(len(columns))] = 1
    found = milp(
        # scaled to about 1, to suit the solver's tolerances
        target / (target.max() or 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None] / (limit or 1), -np.inf, 1)],
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None, found.message  # feasible: the smallest choice fits
    units = list(table)
    return {units[row]: choice for (row, choice, _), taken in zip(columns, found.x, strict=True) if taken > 0.5}
