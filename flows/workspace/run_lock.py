"""The lock that allows one run at a time in a checkout."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.errors import FlowError

LOCK = Path(".modelpress/run.lock")


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Lock the checkout `root`; FlowError names the process that already holds it."""
    path = root / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        for wait in (0.1, 0.2, 0.0):  # retry, because `is_held` locks it briefly
            try:
                # released when the process ends, even if it is killed
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(wait)
        else:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise FlowError(f"another run (process {holder}) is active in {root}; wait until it ends")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_held(root: Path) -> bool:
    """Whether a run is active in the checkout `root`."""
    try:
        with (root / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
