"""`python guard.py CMD...`: run CMD, and end this whole process group when stdin closes.

Stdin is a pipe that only the starting process holds, so it closes when that process is gone, even by `kill -9`. Open
files that the guard was given, such as the lock of a stage, stay open until the whole group has ended.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil

GRACE = 5.0  # seconds between the request to stop and the end
TICK = 0.1  # seconds between looks at what is left


orphaned = threading.Event()


def others() -> Iterator[psutil.Process]:
    """The processes of this group that have not ended, but for this one."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if (
                process.pid != os.getpid()
                and os.getpgid(process.pid) == os.getpgid(0)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                yield process


def watch() -> None:
    """Block until stdin is at its end, then stop the group, this process last."""
    os.read(0, 1)
    orphaned.set()
    os.killpg(0, signal.SIGTERM)
    end = time.monotonic() + GRACE
    while left := list(others()):
        if time.monotonic() > end:
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
        time.sleep(TICK)
    os.killpg(0, signal.SIGKILL)


def guarded(run: Callable[[], int]) -> int:
    """The exit status of what `run` starts and waits for, as a shell gives it; the group ends when stdin closes."""
    # a handler, not SIG_IGN, which CMD would inherit
    signal.signal(signal.SIGTERM, lambda *_: None)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = run()
    if orphaned.is_set():
        watcher.join()  # CMD has ended, but perhaps not what it had started: the watcher ends all, this process too
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(guarded(lambda: subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL)))
