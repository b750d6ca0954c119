"""One run at a time in one checkout."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.errors import FlowError

LOCK = Path(".modelpress/run.lock")


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Hold the checkout `root`; FlowError names the process that holds it already."""
    path = root / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            # the lock goes with the process, however it ends
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise FlowError(f"another run (process {holder}) is at work in {root}; wait until it ends") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
