"""Which precision each part of a model gets, so that the errors add up to the least that fits into a size.

That the harm to a model's loss is near linear in the relative errors of its layers: HIGGS (arXiv 2411.17525). The
search is exact: an integer linear program, for HiGHS (https://highs.dev).
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
    """Of one part at one precision. error: as it adds up, any unit; bits: on disk, scales and zero points counted."""

    error: float
    bits: float


def least_error(table: Mapping[Unit, Mapping[Choice, Cost]], bits: float) -> dict[Unit, Choice]:
    """One choice for each unit: the least sum of errors with at most `bits` in all, to a millionth. The same table
    gives the same choices. TaskError if even the smallest choices take more."""
    smallest = sum(min(cost.bits for cost in costs.values()) for costs in table.values())
    if smallest > bits:
        raise TaskError(f"the smallest choice takes {smallest:.0f} bits, but {bits:.0f} are allowed")
    return _choose(table, "error", "bits", bits)


def least_size(table: Mapping[Unit, Mapping[Choice, Cost]], error: float) -> dict[Unit, Choice]:
    """One choice for each unit: the least sum of bits with errors of at most `error` in all. TaskError if there is none
    so good."""
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
        # both near 1, where the solver's tolerances are meant to be
        target / (target.max() or 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None] / (limit or 1), -np.inf, 1)],
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None, found.message  # the smallest fits, so there is a solution
    units = list(table)
    return {units[row]: choice for (row, choice, _), taken in zip(columns, found.x, strict=True) if taken > 0.5}
