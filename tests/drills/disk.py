"""A disk that fills up during a run: a small file system with a random amount of free space."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.drills import toy as pipeline
from tests.drills.processes import orphans
from tests.drills.yard import Tally, Yard, last_line
from tests.functional.toy import STAGES, Toy

ROOM_MB = 64  # of the small file system
RESTS = (8_000, 400_000, 2_000_000)  # free bytes: for almost nothing, for part of a stage's output, for some stages


def disk_full(yard: Yard) -> Tally:
    """No space left while stages write; then there is space again."""
    tally = Tally("disk full")
    for number in range(yard.rounds):
        for rest in RESTS:
            place = yard.root / f"disk-{number}-{rest}"
            with _small_disk(place) as mounted:
                tally.remark = f"a tmpfs of {ROOM_MB} MB" if mounted else "by RLIMIT_FSIZE, without a mount"
                toy = pipeline.copy(yard.finished, place / "toy")
                tally.count += 1
                tally.recovered += _fill(yard, toy, tally, yard.dice.randrange(rest // 2, rest), mounted)
    return tally


def _fill(yard: Yard, toy: Toy, tally: Tally, rest: int, mounted: bool) -> bool:
    """One run with `rest` bytes of free space, or with files of at most `rest` bytes, and one with enough."""
    for stage in STAGES:
        pipeline.turn(toy, stage, 1)
    ballast = toy.root.parent / "ballast"
    if mounted:
        free = shutil.disk_usage(toy.root).free
        ballast.write_bytes(b"\0" * max(free - rest, 0))
        done = yard.run(toy)
    else:
        with _small_files(rest):
            done = yard.run(toy)
    word = last_line(done.stderr)
    yard.say(f"{rest} bytes: status {done.returncode}: {word}")
    if "Traceback" in done.stderr:
        tally.lost.append(f"a traceback instead of one line: {word}")
    tally.lost += [f"orphan: {line}" for line in orphans(toy.root)]
    ballast.unlink(missing_ok=True)
    return yard.end(toy, tally, repair=True)


@contextmanager
def _small_disk(place: Path) -> Iterator[bool]:
    """Mount a small file system at `place`, if this user can; yield whether it is mounted."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM_MB}m", "drill", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            orphans(place)  # end all processes that use it
            subprocess.run(["umount", "--lazy", str(place)], check=False)


@contextmanager
def _small_files(size: int) -> Iterator[None]:
    """Limit the files of processes started in the body to `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
