"""The memory of a command and its child processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from flows.processes import memory
from flows.processes.memory import GroupMemory
from flows.processes.process import Process

LARGE = 200_000_000  # bytes
# a process and its fork share LARGE bytes; then the fork allocates LARGE more
FORKS = f"""
import os, sys
shared = bytearray(b"x") * {LARGE}
if os.fork() == 0:
    print("forked", flush=True)
    own = bytearray(b"x") * {LARGE}
    print("own", flush=True)
    sys.stdin.read()
os.wait()
"""


def test_the_peak_counts_shared_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.processes.process.TICK", 0.0)
    command = ["sh", "-c", f"sleep 60 | {sys.executable} -c '{FORKS}'"]
    with Process(command, tmp_path, dict(os.environ)) as process:
        output = b""
        for chunk in process.chunks(60):
            output += chunk
            if b"own" in output and process.peak_memory > 1.7 * LARGE:
                break
        assert process.peak_memory < 2.5 * LARGE  # the sum of their resident sizes is 3 * LARGE


def test_an_exact_look_waits_until_the_group_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([100, 90, 105, 109, 84, 150, 140])
    looks = []

    def measure(self: GroupMemory, exact: bool) -> int:
        looks.append(exact)
        return next(sizes)

    monkeypatch.setattr(memory.GroupMemory, "_measure", measure)
    group = GroupMemory(1)
    for _ in range(4):
        group.look()
    assert looks == [False, True, False, False, False]
    group.look()
    assert (looks[5:], group.peak) == ([False, True], 140)
