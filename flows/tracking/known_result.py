"""Find the MLflow run with the result of this checkout without importing MLflow, from a note in a file."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

NOTE = Path(".modelpress/recorded.json")
SQLITE = "sqlite:///"


def note_result(home: Path, uri: str, lock: str, run: str) -> None:
    """Note that the finished run `run` in the store `uri` has the result with this hash of dvc.lock."""
    path = home / NOTE
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"uri": uri, "lock": lock, "run": run}), encoding="utf-8")
    os.replace(part, path)


def known_run(home: Path, uri: str, lock: str) -> str | None:
    """The finished run with the result for this hash of dvc.lock.

    None if there is no note, if the run is no longer in the database, or if `uri` is not an SQLite file.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, sqlite3.Error):
        note = json.loads((home / NOTE).read_text(encoding="utf-8"))
        if (note["uri"], note["lock"]) != (uri, lock) or not uri.startswith(SQLITE):
            return None
        place = Path(uri.removeprefix(SQLITE)).resolve(strict=True).as_uri()
        with closing(sqlite3.connect(f"{place}?mode=ro", uri=True)) as store:
            query = "SELECT 1 FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active' AND status = 'FINISHED'"
            if store.execute(query, (note["run"],)).fetchone():
                return str(note["run"])
    return None
