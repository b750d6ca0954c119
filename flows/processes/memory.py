"""How much memory a stage took, how much there is, and which setting makes a stage take less."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

from tasks.settings import BASE

# what limits a container: of the second and of the first version of control groups
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

_LOWER = {
    "quantize": "calibration.samples",
    "calibrate": "calibration.samples",
    "statistics": "calibration.samples",
    "evaluate": "evaluation.batch_tokens",
    "benchmark": "benchmark.batch_size",
}


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


def out_of_memory(stage: str, what: str, peak: int) -> str:
    """One line on a stage that ran out of memory: `what` happened, its peak (bytes), and what to lower."""
    kind = stage.partition("@")[0]
    # the baseline is copied, whatever the calibration
    setting = None if stage == f"quantize@{BASE}" else _LOWER.get(kind)
    lower = f"lower {setting} in params.yaml, or " if setting else ""
    return (
        f"{stage}: {what}; it was seen to hold {peak / 1e9:.1f} GB, and there are {machine_memory() / 1e9:.1f} GB; "
        f"{lower}run one stage at a time (--jobs 1)"
    )
