"""How much memory a stage took, how much there is, and which setting makes a stage take less."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

# what limits a container: of the second and of the first version of control groups
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def group_memory(group: int) -> int:
    """The resident memory of all processes of a process group together, in bytes."""
    total = 0
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):  # it has ended meanwhile, or is somebody else's
            if os.getpgid(pid) == group:
                total += psutil.Process(pid).memory_info().rss
    return total


def machine_memory() -> int:
    """The memory that can be used here, in bytes: the machine's, or the container's if that is less."""
    total: int = psutil.virtual_memory().total
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # not there, or the word `max`
            return min(total, int(path.read_text(encoding="utf-8")))
    return total
