from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.processes.process import Process, Stopped, TimedOut, stopped_on_error

# a command with a child process; the command ignores SIGTERM
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
sys.stdout.write(f"{child.pid} {os.getpid()}\\n")
sys.stdout.flush()
time.sleep(600)
"""


def _process(code: str, tmp_path: Path) -> Process:
    return Process([sys.executable, "-c", code], tmp_path, dict(os.environ))


def test_output_is_streamed_and_the_status_follows(tmp_path: Path) -> None:
    code = "import sys, time; print('a', flush=True); time.sleep(1.2); print('b'); sys.exit(3)"
    with _process(code, tmp_path) as process:
        chunks = list(process.chunks())
        assert process.wait() == 3
    # an empty chunk reports silence, so that the reader can check the time
    silence = chunks.index(b"")
    assert b"".join(chunks[:silence]) == b"a\n"
    assert b"".join(chunks[silence:]) == b"b\n"


def test_a_timeout_is_reported_and_ends_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.processes.process.GRACE", 0.5)
    pids: list[int] = []
    timed_out = False
    with _process(STUBBORN, tmp_path) as process:
        try:
            for chunk in process.chunks(timeout=2):
                pids += [int(word) for word in chunk.split()]
        except TimedOut:
            timed_out = True
    assert timed_out
    assert len(pids) == 2
    assert not any(_runs(pid) for pid in pids)


def test_an_error_elsewhere_stops_running_and_future_commands(tmp_path: Path) -> None:
    with _process("import time; time.sleep(600)", tmp_path) as process:
        with pytest.raises(RuntimeError), stopped_on_error():
            raise RuntimeError
        with pytest.raises(Stopped):
            list(process.chunks())
    with _process("import time; time.sleep(600)", tmp_path) as late, pytest.raises(Stopped):
        list(late.chunks())
    with stopped_on_error(), _process("print('again')", tmp_path) as process:
        assert b"".join(process.chunks()) == b"again\n"


def test_killing_the_owner_ends_the_whole_group(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from flows.processes.process import Process
with Process([sys.executable, "-c", {STUBBORN!r}], Path("."), dict(os.environ)) as process:
    for chunk in process.chunks():
        print(chunk.decode(), flush=True)
"""
    project = str(Path(__file__).resolve().parents[2])
    owner = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": project}, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pids = [int(word) for word in owner.stdout.readline().split()]
    assert len(pids) == 2
    assert all(_runs(pid) for pid in pids)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    end = time.monotonic() + 15
    while any(_runs(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in pids)


def test_a_lock_is_held_until_the_group_of_a_killed_owner_has_ended(tmp_path: Path) -> None:
    # the command ends on SIGTERM, but its child ignores it
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    command = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {stubborn!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""
    code = f"""
import fcntl, os, sys
from pathlib import Path
from flows.processes.process import Process
lock = open("lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
with Process([sys.executable, "-c", {command!r}], Path("."), dict(os.environ), keep=[lock.fileno()]) as process:
    for chunk in process.chunks():
        print(chunk.decode(), flush=True)
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    child = int(next(line for line in owner.stdout if line.strip()))
    owner.kill()
    owner.wait()
    owner.stdout.close()
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not _runs(child)


def _runs(pid: int) -> bool:
    """Whether a process is running and not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
