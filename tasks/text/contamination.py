"""Contamination: evaluation items that stand in the calibration text, found by the word n-grams that they share.

A variant that was calibrated on the questions it is tested with looks better than it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import TaskError
from tasks.settings import DataSource, Overlap
from tasks.text.documents import records, words

NAMED = 10  # items that a message or report names; the count is complete


@dataclass(frozen=True)
class Match:
    """Of `items` in a set, `matching` share an n-gram; `short` have too few words to. `first` names some (from 0)."""

    items: int
    matching: int
    short: int
    first: list[int]


def ngrams(record: Any, size: int) -> set[int]:
    """Hashes of all runs of `size` words in a record."""
    text = words(record)
    return {hash(tuple(text[i : i + size])) for i in range(len(text) - size + 1)}


def find_overlap(raw: Path, name: str, source: DataSource, seen: set[int], size: int) -> Match:
    """Which items of data set `name` share an n-gram of `size` words with the calibration text's n-grams, `seen`."""
    items, short, found = 0, 0, []
    for index, record in enumerate(records(raw, name, source)):
        items += 1
        own = ngrams(record, size)
        short += not own
        if own & seen:
            found.append(index)
    return Match(items, len(found), short, found[:NAMED])


def check_overlap(overlap: Mapping[str, Match], settings: Overlap) -> None:
    """TaskError naming the items if more than `settings.limit` of them stand in the calibration text."""
    total = sum(match.matching for match in overlap.values())
    if total <= settings.limit:
        return
    named = "; ".join(
        f"{name}: items {', '.join(map(str, match.first))}{' ...' if match.matching > NAMED else ''}"
        for name, match in overlap.items()
        if match.matching
    )
    raise TaskError(
        f"{total} evaluation items share {settings.ngram} words in a row with the calibration text ({named}), "
        f"at most {settings.limit} may; use other calibration text, or raise calibration.overlap.limit"
    )
