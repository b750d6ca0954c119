"""The rules by which a new package replaces the champion."""

from __future__ import annotations

import re
from typing import Any

import pytest

from flows.tracking.champion import Contender, why_not
from tasks.scoring.order import Order
from tasks.settings import GateSettings

GATE = GateSettings(sequential=False, four_bit=0.95, eight_bit=0.98, confidence=0.95, resamples=1000)
CONTRACT: dict[str, Any] = {"limit": 400, "dtype": "float32", "tokenizer": {"tokenizer.json": "a"}}


def contender(right: int, size: int = 100, **contract: Any) -> Contender:
    """A package with the first `right` of 400 items answered correctly."""
    items = [{"item": i, "hash": str(i), "score": float(i < right)} for i in range(400)]
    return Contender(size * 1_000_000, {**CONTRACT, **contract}, {"quiz": items})


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        (contender(301), None),
        (contender(300, 90), None),
        (contender(296, 90), None),  # smaller and a little worse, within the gate's share
        (contender(330, 200), None),  # larger, and better with the gate's confidence
        (contender(300), r"it is no smaller and not better \(100\.0% of its score\)"),
        (contender(299), r"it is no smaller and not better \(99\.7% of its score\)"),
        (contender(301, 120), r"it is 20% larger and not certain to be better \(100\.3% of its score\)"),
        (
            contender(288, 50),
            "it is not certain to be as good: of the champion's score it keeps at least 9.*95% lies between",
        ),
        (contender(200, 50), "it is not certain to be as good: of the champion's score it keeps at most"),
        (contender(400, limit=100), "evaluated in the same way: limit was 400 for the champion and is 100 now"),
    ],
)
def test_a_new_champion_is_not_worse_and_better_in_something(new: Contender, reason: str | None) -> None:
    found = why_not(contender(300), new, GATE, share=0.95)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(reason, found), found


def test_a_different_tokenizer_does_not_prevent_a_comparison() -> None:
    assert why_not(contender(300), contender(310, tokenizer={"tokenizer.json": "b"}), GATE, share=0.95) is None


def test_other_items_are_not_compared() -> None:
    new = contender(310)
    new.items["quiz"][3]["hash"] = "another question"
    found = why_not(contender(300), new, GATE, share=0.95)
    assert found is not None
    assert found.startswith("the two did not answer the same items of quiz; to compare them, run the champion's")


ORDER = Order(1234, {"quiz": 400})


def scored_until(look: int, right: int, size: int = 100, order: bool = True) -> Contender:
    """A package whose variant was scored until `look`; without `order`, a record of an earlier version."""
    had = set(ORDER.until(look)["quiz"])
    whole = contender(right, size, **({"order": ORDER.record()} if order else {}))
    return Contender(whole.size_bytes, whole.contract, {"quiz": [i for i in whole.items["quiz"] if i["item"] in had]})


SEQUENTIAL = GATE.model_copy(update={"sequential": True})


@pytest.mark.parametrize(
    ("champion", "new"),
    [
        pytest.param(scored_until(3, 300), scored_until(5, 300, 90), id="the new one needed more items"),
        pytest.param(scored_until(5, 300), scored_until(3, 300, 90), id="the new one needed fewer"),
        pytest.param(scored_until(5, 300, order=False), scored_until(3, 300, 90), id="an earlier champion"),
    ],
)
def test_packages_that_stopped_early_are_compared_over_common_items(champion: Contender, new: Contender) -> None:
    for gate in (SEQUENTIAL, GATE):
        assert why_not(champion, new, gate, share=0.9) is None


def test_items_of_no_look_are_refused() -> None:
    new = scored_until(3, 300, 90)
    del new.items["quiz"][7]
    found = why_not(scored_until(5, 300), new, SEQUENTIAL, share=0.9)
    assert found is not None
    assert "do not match any look" in found


def test_another_order_is_another_contract() -> None:
    new = scored_until(5, 300, 90)
    other = Contender(new.size_bytes, {**new.contract, "order": Order(1, {"quiz": 400}).record()}, new.items)
    found = why_not(scored_until(5, 300), other, SEQUENTIAL, share=0.9)
    assert found is not None
    assert re.search("evaluated in the same way: order was .* modelpress run", found)
