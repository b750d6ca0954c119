"""Run a command in a separate process group that never outlives this process."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from flows.errors import FlowError
from flows.processes.forked import Forked, fork_server
from flows.processes.memory import GroupMemory

GUARD = Path(__file__).with_name("guard.py")
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
TICK = 0.5  # seconds between checks while the command prints nothing


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """The command was stopped: the run was interrupted."""


class TimedOut(Exception):  # noqa: N818
    """The command exceeded its timeout."""


_live: set[Process] = set()
_lock = threading.Lock()
_closed = threading.Event()


class Process:
    """A running command. Use it as a context manager: on exit, all processes of its group have ended.

    DVC neither forwards signals to its stage nor ends with its parent. So signals go to the whole group, and a guard
    inside the group ends it when this process is gone.
    keep: open files that stay open until the group has ended.
    forked: fork the programs that the command starts with `python -m` from a process that has imported their libraries.
    """

    def __init__(
        self,
        command: list[str],
        cwd: Path,
        env: dict[str, str],
        *,
        output: int = subprocess.PIPE,
        keep: Collection[int] = (),
        forked: bool = False,
    ) -> None:
        if not GUARD.is_file():
            raise FlowError(f"{GUARD} is missing, and without it a stage could outlive its run; reinstall modelpress")
        self._stop = threading.Event()
        self._looked = 0.0
        self._popen: subprocess.Popen[bytes] | Forked = (
            forked and _forked(command, cwd, env, keep)
        ) or subprocess.Popen(
            [sys.executable, "-I", str(GUARD), *command],
            cwd=cwd,
            env=env,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=tuple(keep),
        )
        self._memory = GroupMemory(self._popen.pid)

    def __enter__(self) -> Process:
        with _lock:
            _live.add(self)
            if _closed.is_set():
                self.stop()
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _live.discard(self)
        self.kill()

    @property
    def alive(self) -> bool:
        """Whether the command is still running."""
        return self._popen.poll() is None

    @property
    def peak_memory(self) -> int:
        """The peak memory of the whole group in bytes, as sampled; short peaks can be missed."""
        return self._memory.peak

    def chunks(self, timeout: float | None = None) -> Iterator[bytes]:
        """Yield the output as it arrives, and b"" after each half second of silence, until the command ends.

        timeout: in seconds. Stopped and TimedOut leave the command running; the end of the context ends it.
        """
        pipe = self._popen.stdout
        if pipe is None:
            raise ValueError("the output of this command is not captured")
        deadline = time.monotonic() + timeout if timeout else None
        while True:
            self._look()
            if self._stop.is_set():
                raise Stopped
            if deadline and time.monotonic() > deadline:
                raise TimedOut
            if select.select([pipe], [], [], TICK)[0]:
                chunk = os.read(pipe.fileno(), 65536)
                if not chunk:
                    return
                yield chunk
            elif not self.alive:
                return  # a leftover process still holds the pipe
            else:
                yield b""

    def wait(self) -> int:
        """Wait and return the exit status."""
        return self._popen.wait()

    def stop(self) -> None:
        """Make `chunks` raise Stopped; returns at once."""
        self._stop.set()

    def descendants(self) -> list[psutil.Process]:
        """All child processes, direct and indirect, including those that left the process group."""
        with suppress(psutil.Error):
            return psutil.Process(self._popen.pid).children(recursive=True)
        return []

    def terminate(self) -> None:
        """Send SIGTERM to the group and return at once, so that several groups can end in parallel."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group: SIGTERM, then SIGKILL after five seconds."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if not self._signal(sign):
                break
            end = time.monotonic() + GRACE
            while time.monotonic() < end:
                self._popen.poll()
                if not self._signal(0):
                    break
                time.sleep(0.05)
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe:
                pipe.close()

    def _look(self) -> None:
        """Sample the memory, at most once per TICK."""
        now = time.monotonic()
        if now - self._looked >= TICK:
            self._looked = now
            self._memory.look()

    def _signal(self, sign: int) -> bool:
        try:
            os.killpg(self._popen.pid, sign)
        except ProcessLookupError:
            return False
        return True


def _forked(command: list[str], cwd: Path, env: dict[str, str], keep: Collection[int]) -> Forked | None:
    """Start the command through the fork server; None if there is none."""
    address = fork_server()
    with suppress(ConnectionError):
        return Forked(address, command, cwd, env, keep) if address else None
    return None


def pause(seconds: float) -> None:
    """Sleep; raises Stopped as soon as `stopped_on_error` stops all commands."""
    if _closed.wait(seconds):
        raise Stopped


@contextmanager
def stopped_on_error() -> Iterator[None]:
    """If the body fails, stop all commands, including those that other threads are about to start.

    This lets the waiting threads end. Prefect alone would wait until the commands finish.
    """
    _closed.clear()
    try:
        yield
    except BaseException:
        with _lock:
            _closed.set()
            for process in _live:
                process.stop()
        raise
