"""`python guard.py CMD...`: run CMD, and end this process group when stdin closes.

Stdin is a pipe held only by the parent process, so it closes when the parent ends, even by `kill -9`. Files that the
guard inherits, such as a stage's lock, stay open until the whole group has ended.
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

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
TICK = 0.1  # seconds between checks for remaining processes


orphaned = threading.Event()


def others() -> Iterator[psutil.Process]:
    """The other running processes of this group."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if (
                process.pid != os.getpid()
                and os.getpgid(process.pid) == os.getpgid(0)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                yield process


def watch() -> None:
    """Block until stdin closes, then end all processes of the group, this one last."""
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
    """Call `run`, which waits for a command, and return its exit status in the shell's convention.

    If stdin closes, the process group is ended.
    """
    # a handler, not SIG_IGN, which CMD would inherit
    signal.signal(signal.SIGTERM, lambda *_: None)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = run()
    if orphaned.is_set():
        watcher.join()  # CMD has ended, but maybe not its children: the watcher ends them and this process
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(guarded(lambda: subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL)))
