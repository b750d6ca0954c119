"""What this machine is and how much memory there is: for messages and records; decides no byte of a result."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from pathlib import Path

from tasks.device import compute_device


def processor_name() -> str:
    """What torch computes on here: the GPU's name, or the CPU's model."""
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """The CPU's model."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def current_memory() -> int:
    """The memory that this process holds now, bytes; on a GPU, the GPU's memory."""
    import psutil
    import torch

    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def release_memory() -> None:
    """Give back to the system what this process no longer needs. glibc keeps freed blocks that others lie behind: of a
    model's layers, one after another, as much again as one of them needs, and more."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # there is none outside glibc
        trim(0)


def peak_memory(device: str | None = None) -> int:
    """The most memory that this process has held so far, bytes; on a GPU, the GPU's memory. device: as `compute_device`
    says, if None."""
    import torch

    if (device or compute_device()) == "cuda":
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """TEMPORARY until libs branch lands."""
    import psutil

    return int(psutil.virtual_memory().available)
