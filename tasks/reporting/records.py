"""Read the records of earlier stages; an error names the stage that makes them again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.errors import TaskError


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """Read a JSON object; a TaskError for a missing or broken file names the stage that writes it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TaskError(f"{path} not found; make it with: dvc repro {stage}") from error
    except ValueError as error:
        raise TaskError(f"{path} is not JSON ({error}); make it again with: dvc repro -f {stage}") from error
    if not isinstance(value, dict):
        raise TaskError(
            f"{path} contains {type(value).__name__}, expected an object; make it again with: dvc repro -f {stage}"
        )
    return value


def read_lines(path: Path, stage: str, expected: str, fits: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Read a JSON object from each line. TaskError as `read_json`, and if one does not fit: it is not `expected`."""
    found = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                value = json.loads(line)
                if not fits(value):
                    raise ValueError(f"line {number} is not {expected}")
                found.append(value)
    except FileNotFoundError as error:
        raise TaskError(f"{path} not found; make it with: dvc repro {stage}") from error
    except (ValueError, AttributeError) as error:
        raise TaskError(f"{path}: {error}; make it again with: dvc repro -f {stage}") from error
    return found
