"""How much memory a stage takes: all of its processes together."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil

STEP = 1.1  # growth after which it is worth measuring exactly


class GroupMemory:
    """The memory of all processes of a process group together, and its peak."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._resident = 0
        self.peak = 0  # bytes

    def look(self) -> None:
        """Update the peak. It counts memory that processes share, as forks do, once where the system tells.

        The exact measurement takes a tenth of a second for each gigabyte, so it waits until a quick one has grown.
        """
        resident = self._measure(exact=False)
        if resident > STEP * self._resident:
            self._resident = resident
            self.peak = max(self.peak, self._measure(exact=True))

    def _measure(self, exact: bool) -> int:
        total = 0
        for pid in psutil.pids():
            with suppress(OSError, psutil.Error):  # it has ended meanwhile, or belongs to another user
                if os.getpgid(pid) == self._group:
                    process = psutil.Process(pid)
                    memory = process.memory_full_info() if exact else process.memory_info()
                    total += getattr(memory, "pss", memory.rss)
        return total
