"""Cache of item scores, so that no item is scored twice under the same conditions.

A file holds the scores of one unit: the items that were scored together. The other items in a batch can change the last
bits of a score and, with quantized activations, even an answer. With whole units, the cache returns the same scores as
scoring again. The folder is outside DVC's outputs and can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.output import write_text

Scores = dict[str, list[tuple[str, float]]]  # by task: metric and score of each item, in the unit's order


class ScoreCache:
    """The scores for one set of conditions. key: everything that determines a score, except the items."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self._folder = folder / _digest(key)

    def read(self, unit: Any, sizes: Mapping[str, int]) -> Scores | None:
        """The scores of a unit; None if they are missing or damaged. sizes: number of items per task."""
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
        """Store the scores of a unit atomically."""
        content = {task: [[metric, score] for metric, score in found] for task, found in scores.items()}
        write_text(self._path(unit), json.dumps({"sha256": _digest(content), "scores": content}) + "\n")

    def _path(self, unit: Any) -> Path:
        return self._folder / f"{_digest(unit)}.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
