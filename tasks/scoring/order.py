"""The order in which a task's items are scored, and which items are scored together.

Items are split into consecutive blocks of `BLOCK`. The items of each block are distributed at random over `LOOKS` looks
of equal size, so a look is a random sample of the whole task. Blocks and looks do not depend on the variant or on the
number of planned items: when `evaluation.limit` grows, every item keeps its look and its block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from tasks.errors import TaskError

LOOKS = 5
BLOCK = 50  # items; a multiple of LOOKS


@dataclass(frozen=True)
class Order:
    """seed: of the random order. items: number of planned items per task, counted from the start of its data."""

    seed: int
    items: Mapping[str, int]
    looks: int = LOOKS
    block: int = BLOCK

    @classmethod
    def read(cls, record: Any) -> Order:
        """Read a contract's `order`; TaskError if it is missing or was written by an incompatible version."""
        try:
            order = cls(**record)
        except TypeError:
            raise TaskError(
                "the items were evaluated without an order, by an earlier version; "
                "evaluate them again: dvc repro -f reference, then dvc repro"
            ) from None
        if (order.looks, order.block) != (LOOKS, BLOCK):
            raise TaskError(
                f"the items were evaluated with {order.looks} looks and blocks of {order.block}, expected {LOOKS} and "
                f"{BLOCK}; evaluate them again: dvc repro -f reference, then dvc repro"
            )
        return order

    def record(self) -> dict[str, Any]:
        """The order as JSON values, for the contract."""
        return asdict(self) | {"items": dict(self.items)}

    def until(self, look: int) -> dict[str, list[int]]:
        """Each task's items in the looks 1 to `look`."""
        return {task: [i for i in range(n) if look_of(task, i, self.seed) <= look] for task, n in self.items.items()}

    def fractions(self, look: int) -> tuple[float, ...]:
        """The cumulative share of planned items after each of the looks 1 to `look`."""
        counts = [sum(map(len, self.until(one).values())) for one in range(1, look + 1)]
        return tuple(count / sum(self.items.values()) for count in counts)

    def reached(self, had: Mapping[str, Collection[int]]) -> int:
        """The look after which exactly the items `had` have been scored; TaskError if there is no such look."""
        found = {task: set(items) for task, items in had.items()}
        for look in range(1, LOOKS + 1):
            if found == {task: set(items) for task, items in self.until(look).items()}:
                return look
        counts = ", ".join(f"{len(found.get(task, ()))} of {task}'s {n}" for task, n in self.items.items())
        raise TaskError(f"the scored items ({counts}) do not match any look; evaluate the variant again")


@lru_cache(maxsize=65536)
def _dealt(task: str, block: int, seed: int) -> tuple[int, ...]:
    """The look of each item of a block, in the items' order."""
    places = range(block * BLOCK, (block + 1) * BLOCK)
    shuffled = sorted(places, key=lambda item: hashlib.sha256(f"{seed} {task} {item}".encode()).digest())
    look = {item: rank * LOOKS // BLOCK + 1 for rank, item in enumerate(shuffled)}
    return tuple(look[item] for item in places)


def look_of(task: str, item: int, seed: int) -> int:
    """The look in which an item is scored, from 1."""
    return _dealt(task, item // BLOCK, seed)[item % BLOCK]
