"""The heartbeat of a flow: it writes a file, and its stages on a cluster stop when the file goes stale.

A signal reaches only this machine, and neither Dask nor Ray stops a running task.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PULSES = Path(".modelpress/pulse")
BEAT = 2.0  # seconds
LOOK = 0.5  # minimum seconds between two reads of the file
# unchanged reads until the flow counts as gone: a minute, to tolerate a slow network disk
LOOKS = 120


@contextmanager
def beating(root: Path, run: str) -> Iterator[Path]:
    """Write the heartbeat file while the body runs, and yield its path. Stages stop once it is deleted.

    Call it only while this run holds `root`: files left by a killed run are removed.
    """
    folder = root / PULSES
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        left.unlink(missing_ok=True)
    path = folder / run
    path.write_text("0", encoding="ascii")
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT):
            count += 1
            path.write_text(str(count), encoding="ascii")

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield path
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def gone(path: Path) -> Callable[[], bool]:
    """Return a function that tells whether the flow of this heartbeat file is gone. It can be called often, because it
    limits how often it reads the file.

    It counts reads, not time: the machines' clocks differ, and a suspended laptop neither writes nor reads.
    """
    last, same, looked = "", 0, 0.0

    def look() -> bool:
        nonlocal last, same, looked
        now = time.monotonic()
        if now - looked < LOOK:
            return same >= LOOKS
        looked = now
        try:
            beat = path.read_text(encoding="ascii")
        except FileNotFoundError:
            same = LOOKS
        except OSError:  # a network disk that is briefly unavailable
            same += 1
        else:
            same = same + 1 if beat == last else 0
            last = beat
        return same >= LOOKS

    return look
