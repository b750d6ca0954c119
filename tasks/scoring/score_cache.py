"""Scores of items that one model has given before, so that no item is scored twice under the same conditions.

A file holds the scores of one unit: items that were scored together, as the last bits of a score can depend on what
else was in the batch, and with rounded activations an answer can. So what the cache gives is what scoring would give.
The folder lies outside DVC's outputs; it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.output import write_text

Scores = dict[str, list[tuple[str, float]]]  # of each task, in the unit's order: metric and score


class ScoreCache:
    """The scores under one set of conditions. key: everything that decides a score except the items themselves."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self._folder = folder / _digest(key)

    def read(self, unit: Any, sizes: Mapping[str, int]) -> Scores | None:
        """The scores of a unit, `sizes` of each task; None if they are not there or damaged."""
        try:
            content = json.loads(self._path(unit).read_text(encoding="utf-8"))
            scores: Scores = {
                task: [(str(metric), float(score)) for metric, score in found]
                for task, found in content["scores"].items()
            }
            whole = content["sha256"] == _digest(content["scores"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return scores if whole and {task: len(found) for task, found in scores.items()} == dict(sizes) else None

    def write(self, unit: Any, scores: Mapping[str, Sequence[tuple[str, float]]]) -> None:
        """Keep the scores of a unit; whole or not at all."""
        content = {task: [[metric, score] for metric, score in found] for task, found in scores.items()}
        write_text(self._path(unit), json.dumps({"sha256": _digest(content), "scores": content}) + "\n")

    def _path(self, unit: Any) -> Path:
        return self._folder / f"{_digest(unit)}.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
