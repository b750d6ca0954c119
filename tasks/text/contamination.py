"""Contamination: evaluation items that share word n-grams with the calibration text.

A variant calibrated on its test questions scores too well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import TaskError
from tasks.settings import DataSource, Overlap
from tasks.text.documents import records, words

NAMED = 10  # items listed in a message or report; the count is complete


@dataclass(frozen=True)
class Match:
    """Of `items` in a set, `matching` share an n-gram and `short` have too few words; `first`: some indices, from 0."""

    items: int
    matching: int
    short: int
    first: list[int]


def ngrams(record: Any, size: int) -> set[int]:
    """Hashes of all n-grams of `size` words in a record."""
    text = words(record)
    return {hash(tuple(text[i : i + size])) for i in range(len(text) - size + 1)}


def find_overlap(raw: Path, name: str, source: DataSource, seen: set[int], size: int) -> Match:
    """Find the items of data set `name` that share an n-gram of `size` words with `seen`, the calibration text's."""
    items, short, found = 0, 0, []
    for index, record in enumerate(records(raw, name, source)):
        items += 1
        own = ngrams(record, size)
        short += not own
        if own & seen:
            found.append(index)
    return Match(items, len(found), short, found[:NAMED])


def check_overlap(overlap: Mapping[str, Match], settings: Overlap) -> None:
    """TaskError naming the items if more than `settings.limit` of them overlap with the calibration text."""
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
        f"at most {settings.limit} allowed; use other calibration text, or raise calibration.overlap.limit"
    )
