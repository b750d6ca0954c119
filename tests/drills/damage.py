"""Damage by a crash or a bad disk: a corrupt cache, an empty dvc.lock, a stale lock.

All need `modelpress doctor --repair`, and then the next run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.drills import toy as pipeline
from tests.drills.yard import Tally, Yard
from tests.functional.toy import Toy


def corrupt_cache(yard: Yard) -> Tally:
    """A flipped bit in objects of DVC's cache, and so in their links; size, time and mode are unchanged."""
    tally = Tally("cache corrupted")
    for number in range(yard.rounds):
        toy = yard.toy(f"toy-{number}")
        objects = sorted((toy.root / ".dvc/cache/files/md5").glob("*/*"))
        listings = [path for path in objects if path.suffix == ".dir"]
        files = [path for path in objects if path.suffix != ".dir" and path.stat().st_nlink > 1]
        for path in [*yard.dice.sample(files, 3), *yard.dice.sample(listings, 2)]:
            _flip_a_bit(path, yard.dice.randrange(path.stat().st_size))
            tally.count += 1
            recovered = yard.end(toy, tally, repair=True) and _whole(path)
            tally.recovered += recovered
            yard.say(f"{path.parent.name}{path.name}: {'recreated' if recovered else 'LOST'}")
    return tally


def empty_lock_file(yard: Yard) -> Tally:
    """dvc.lock is empty, once with and once without a copy in git; nothing is computed again."""
    tally = Tally("dvc.lock empty")
    for number in range(yard.rounds):
        for committed in (False, True):
            toy = yard.toy(f"toy-{number}-{committed}")
            if committed:
                toy.command("git", "add", "dvc.lock")
                pipeline.commit(toy)
            (toy.root / "dvc.lock").write_text("")
            tally.count += 1
            tally.recovered += _repaired_without_work(yard, toy, tally)
    return tally


def stale_lock(yard: Yard) -> Tally:
    """.dvc/tmp/rwlock names a process id that another program has now; then it is empty; then truncated."""
    tally = Tally("rwlock stale")
    for number in range(yard.rounds):
        toy = yard.toy(f"toy-{number}")
        held = json.dumps({"write": {str(toy.root / "models/int8"): {"pid": os.getpid(), "cmd": "dvc repro"}}})
        for text in (held, "", held[: yard.dice.randrange(1, len(held))]):
            (toy.root / ".dvc/tmp/rwlock").write_text(text)
            tally.count += 1
            tally.recovered += _repaired_without_work(yard, toy, tally)
    return tally


def _repaired_without_work(yard: Yard, toy: Toy, tally: Tally) -> bool:
    """Whether a run refuses in one line with the remedy, the remedy works, and no stage runs again."""
    before = len(toy.executed())
    refused = yard.run(toy)
    if refused.returncode != 1 or "modelpress doctor --repair" not in refused.stderr:
        tally.lost.append(f"the run did not name the remedy: {refused.stderr.strip()}")
    well = yard.end(toy, tally, repair=True)
    if again := toy.executed()[before:]:
        tally.lost.append(f"computed again: {', '.join(again)}")
        return False
    return well


def _flip_a_bit(path: Path, position: int) -> None:
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    path.chmod(before.st_mode & 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _whole(path: Path) -> bool:
    from flows.doctor.cache_check import damaged_objects

    cache = path.parents[3]
    return path.exists() and damaged_objects(cache, lambda read, total: None) == []
