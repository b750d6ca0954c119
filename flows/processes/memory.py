"""Measure the memory of a stage: the total of all its processes."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil

STEP = 1.1  # growth factor that triggers an exact measurement


class GroupMemory:
    """The peak of the total memory of a process group."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._resident = 0
        self.peak = 0  # bytes

    def look(self) -> None:
        """Update the peak. Memory shared between processes, as after a fork, counts once if the system reports it.

        An exact measurement takes 0.1 seconds per gigabyte, so it is made only when a quick one shows growth.
        """
        resident = self._measure(exact=False)
        if resident > STEP * self._resident:
            self._resident = resident
            self.peak = max(self.peak, self._measure(exact=True))

    def _measure(self, exact: bool) -> int:
        total = 0
        for pid in psutil.pids():
            with suppress(OSError, psutil.Error):  # it has ended, or belongs to another user
                if os.getpgid(pid) == self._group:
                    process = psutil.Process(pid)
                    memory = process.memory_full_info() if exact else process.memory_info()
                    total += getattr(memory, "pss", memory.rss)
        return total
