"""How much memory a stage takes: all of its processes together."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil


def group_memory(group: int) -> int:
    """The resident memory of all processes of a process group together, in bytes.

    Where the system tells, memory that a process shares with others, as forks do, counts by its share.
    """
    total = 0
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):  # it has ended meanwhile, or is somebody else's
            if os.getpgid(pid) == group:
                memory = psutil.Process(pid).memory_full_info()
                total += getattr(memory, "pss", memory.rss)
    return total
