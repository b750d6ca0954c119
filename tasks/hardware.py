"""This machine's processor and memory, for messages and records; never affects a result."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from tasks.device import compute_device


@dataclass(frozen=True)
class _Kind:
    """A version of control groups: its file system type and the names of a group's memory files."""

    filesystem: str
    limit: str
    usage: str
    reclaimable: str  # key in memory.stat: file cache that the kernel can drop


_V1 = _Kind("cgroup", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Kind("cgroup2", "memory.max", "memory.current", "inactive_file")


def cpu_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stage_threads() -> int:
    """The threads for a stage and its server: OMP_NUM_THREADS, which the flow sets so that stages share the cores, or
    else one for each core."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdecimal() and int(named) else cpu_cores()


def processor_name() -> str:
    """The name of the GPU that torch uses, or else the CPU's model."""
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


def total_memory(root: Path = Path("/")) -> int:
    """The memory that this process may use, in bytes: the machine's, or the smallest limit of its control groups.

    Groups are nested, and a group's limit applies to all groups below it. `root` holds the folders `proc` and `sys`.
    """
    limits = (_number(group / kind.limit) for group, kind in _groups(root))
    return min([int(psutil.virtual_memory().total), *(limit for limit in limits if limit is not None)])


def device_memory() -> int:
    """The memory, bytes, of what computes: of the GPU, or `total_memory`."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else total_memory()


def available_memory(root: Path = Path("/")) -> int:
    """The memory that this process can still allocate, in bytes: the machine's free memory, or the smallest remainder
    of its control groups. File cache that the kernel can drop counts as free. `root`: see `total_memory`."""
    left = [int(psutil.virtual_memory().available)]
    for group, kind in _groups(root):
        limit, usage = _number(group / kind.limit), _number(group / kind.usage)
        if limit is not None and usage is not None:
            left.append(max(0, limit - usage + _reclaimable(group, kind)))
    return min(left)


def current_memory() -> int:
    """The memory that this process uses now, in bytes; with a GPU, GPU memory."""
    import torch

    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def release_memory() -> None:
    """Return freed memory to the system. glibc keeps freed blocks that lie below blocks in use: when a model's layers
    are loaded one after another, more than the size of one layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # glibc only
        trim(0)


def peak_memory(device: str | None = None) -> int:
    """The peak memory of this process so far, in bytes; on a GPU, GPU memory. device: default `compute_device()`."""
    if (device or compute_device()) == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _groups(root: Path) -> Iterator[tuple[Path, _Kind]]:
    """Yield the folders of this process's memory control groups, from its own up to the mounted root.

    Yields nothing where no such hierarchy is mounted (another system, a sandbox).
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        kind = _V1 if controllers else _V2
        for mount, top in _mounts(root, kind):
            group = PurePosixPath(name)
            # a container may see its own group mounted as the root, under its name on the host
            inside = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
            for part in (inside, *inside.parents):
                yield mount / part, kind


def _mounts(root: Path, kind: _Kind) -> Iterator[tuple[Path, str]]:
    """Yield each mount point of a memory hierarchy, and the group at the root of the mount (man 5 proc)."""
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        filesystem, _, options = source.split(" ", 2)
        if filesystem == kind.filesystem and (kind is _V2 or "memory" in options.split(",")):
            _, _, _, top, point, *_ = mount.split(" ")
            yield root / point.lstrip("/"), top


def _number(path: Path) -> int | None:
    """The number in a file; None if the file is missing or contains `max`."""
    word = next(iter(_lines(path)), "max")
    return int(word) if word.isdecimal() else None


def _reclaimable(group: Path, kind: _Kind) -> int:
    """The file cache of a group that the kernel can drop, in bytes."""
    counts = dict(line.split(" ", 1) for line in _lines(group / "memory.stat"))
    return int(counts.get(kind.reclaimable, 0))


def _lines(path: Path) -> list[str]:
    """The lines of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
