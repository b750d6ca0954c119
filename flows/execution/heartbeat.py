"""Stages on a cluster end with the flow that started them: it leaves a pulse in the workspace, and they feel for it.

A signal reaches only this machine, and neither Dask nor Ray ends a task that has begun.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PULSES = Path(".modelpress/pulse")
BEAT = 2.0  # seconds
LOOK = 0.5  # seconds between two looks at the least
# without a beat: then the flow is gone without having said so; they take a minute, as a slow network disk may
LOOKS = 120


@contextmanager
def beating(root: Path, run: str) -> Iterator[Path]:
    """Beat while the body runs; the file that tells. Once it is gone, the stages stop.

    Call it only where `root` is held by this run: what a killed run has left there is removed.
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
    """A function that says whether the flow of this pulse is gone; call it often, it looks seldom.

    Looks are counted, not time: clocks of machines differ, and a suspended laptop beats no more than it looks.
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
        except OSError:  # a network disk that is away for a moment
            same += 1
        else:
            same = same + 1 if beat == last else 0
            last = beat
        return same >= LOOKS

    return look
