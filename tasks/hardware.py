"""What this machine is and how much memory there is: for messages and records; decides no byte of a result."""

from __future__ import annotations

import ctypes
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
    """A version of control groups: the type of its file system, and the names of a group's memory files."""

    filesystem: str
    limit: str
    usage: str
    reclaimable: str  # in memory.stat: file cache that the kernel drops first


_V1 = _Kind("cgroup", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Kind("cgroup2", "memory.max", "memory.current", "inactive_file")


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


def total_memory(root: Path = Path("/")) -> int:
    """The memory that this process may use, bytes: the machine's, or the smallest limit of its control groups.

    Groups are nested, and each one's limit holds for all below it. `root` holds the folders `proc` and `sys`.
    """
    limits = (_number(group / kind.limit) for group, kind in _groups(root))
    return min([int(psutil.virtual_memory().total), *(limit for limit in limits if limit is not None)])


def available_memory(root: Path = Path("/")) -> int:
    """The memory that this process can still get, bytes: what the machine has free, or the least that is left in one
    of its control groups. File cache that the kernel can drop counts as free. `root`: as for `total_memory`."""
    left = [int(psutil.virtual_memory().available)]
    for group, kind in _groups(root):
        limit, usage = _number(group / kind.limit), _number(group / kind.usage)
        if limit is not None and usage is not None:
            left.append(max(0, limit - usage + _reclaimable(group, kind)))
    return min(left)


def current_memory() -> int:
    """The memory that this process holds now, bytes; on a GPU, the GPU's memory."""
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
    if (device or compute_device()) == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _groups(root: Path) -> Iterator[tuple[Path, _Kind]]:
    """The folders of this process's memory control groups, from its own up to the top of what is mounted.

    Where no such hierarchy is mounted (another system, a sandbox), there are none.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        kind = _V1 if controllers else _V2
        for mount, top in _mounts(root, kind):
            group = PurePosixPath(name)
            # a container may see its own group mounted as the top, under the name that it has outside
            inside = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
            for part in (inside, *inside.parents):
                yield mount / part, kind


def _mounts(root: Path, kind: _Kind) -> Iterator[tuple[Path, str]]:
    """Where a hierarchy that governs memory is mounted, and which group of it is the top there (man 5 proc)."""
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        filesystem, _, options = source.split(" ", 2)
        if filesystem == kind.filesystem and (kind is _V2 or "memory" in options.split(",")):
            _, _, _, top, point, *_ = mount.split(" ")
            yield root / point.lstrip("/"), top


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file, or the word `max` in it."""
    word = next(iter(_lines(path)), "max")
    return int(word) if word.isdecimal() else None


def _reclaimable(group: Path, kind: _Kind) -> int:
    """The file cache of a group that the kernel drops before it refuses memory, bytes."""
    counts = dict(line.split(" ", 1) for line in _lines(group / "memory.stat"))
    return int(counts.get(kind.reclaimable, 0))


def _lines(path: Path) -> list[str]:
    """The lines of a file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
