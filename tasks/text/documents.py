"""Read documents from data/raw one at a time, in any file format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.errors import TaskError
from tasks.settings import DataSource

FILES = {"text": "data.txt", "jsonl": "data.jsonl", "parquet": "data.parquet"}  # by format
SEPARATOR = "\n\n"  # between concatenated documents


def records(raw: Path, name: str, source: DataSource) -> Iterator[Any]:
    """Yield the records of data set `name` under `raw` unchanged: strings from a text file, otherwise mappings."""
    path = raw / name / FILES[source.format]
    match source.format:
        case "text":
            text = path.read_text(encoding="utf-8")
            yield from re.split(source.split, text) if source.split else [text]
        case "jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        case "parquet":
            from pyarrow import parquet

            for batch in parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()


def documents(raw: Path, name: str, source: DataSource) -> Iterator[Any]:
    """Yield the texts of data set `name`: the document or the record's `field`, with `strip` removed.

    A list of messages is yielded unchanged, and so is a null. TaskError if a record lacks the field.
    """
    for number, record in enumerate(records(raw, name, source), start=1):
        value = record
        if source.field is not None:
            if not isinstance(record, dict) or source.field not in record:
                has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise TaskError(f"record {number} of {name} has no field {source.field!r} (it has: {has}); fix `field`")
            value = record[source.field]
        if isinstance(value, str) and source.strip:
            value = re.sub(source.strip, "", value)
        yield value


def words(record: Any) -> list[str]:
    """The lower-case words of a string, or of every string in a mapping or list."""
    if isinstance(record, str):
        return re.findall(r"\w+", record.lower())
    values = record.values() if isinstance(record, dict) else record if isinstance(record, list) else ()
    return [word for value in values for word in words(value)]
