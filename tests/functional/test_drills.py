"""Interrupted drills leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.drills.processes import below
from tests.functional.toy import PROJECT
from tests.waiting import soon


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupt_leaves_no_process_folder_or_disk(tmp_path: Path, sign: int, status: int) -> None:
    command = [sys.executable, "-m", "tests.drills", "--only", "disk", "--only", "hub"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    drills = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert soon(lambda: [*tmp_path.glob("*/disk/disk-0-*/toy/times.jsonl")], 90)
        drills.send_signal(sign)
        assert drills.wait(60) == status
    finally:
        drills.kill()
    assert below(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    mounts = [partition.mountpoint for partition in psutil.disk_partitions(all=True)]
    assert [mount for mount in mounts if mount.startswith(str(tmp_path))] == []
