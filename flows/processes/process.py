"""A command in a process group of its own that never outlives the process that started it."""

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
TICK = 0.5  # seconds between looks at the clock while the command is silent


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """The command was stopped: the run was interrupted."""


class TimedOut(Exception):  # noqa: N818
    """The command took longer than it was given."""


_live: set[Process] = set()
_lock = threading.Lock()
_closed = threading.Event()


class Process:
    """A running command; use it as a context manager, at whose end nothing of its process group is left.

    DVC neither forwards signals to its stage nor dies with us, so signals go to the whole group, and a guard
    inside the group ends it when this process is gone. `keep` are open files that the guard keeps open as long.
    forked: fork the programs that the command starts by `python -m` from a process that has imported their libraries.
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
            raise FlowError(f"{GUARD} is missing, without which a stage could outlive its run; install modelpress anew")
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
        """Whether the command still runs."""
        return self._popen.poll() is None

    @property
    def peak_memory(self) -> int:
        """The most that its whole group was seen to hold, in bytes; a peak between two looks is missed."""
        return self._memory.peak

    def chunks(self, timeout: float | None = None) -> Iterator[bytes]:
        """Its output as it comes, b"" after each half second of silence, until it ends.

        Stopped and TimedOut (`timeout` in seconds) leave the command running; the end of the context ends it.
        """
        pipe = self._popen.stdout
        if pipe is None:
            raise ValueError("the output of this command goes elsewhere")
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
                return  # something that it left behind still holds the pipe
            else:
                yield b""

    def wait(self) -> int:
        """Its exit status."""
        return self._popen.wait()

    def stop(self) -> None:
        """Ask whoever reads `chunks` to stop; returns at once."""
        self._stop.set()

    def descendants(self) -> list[psutil.Process]:
        """What it has started, and what that has: also those that left its process group."""
        with suppress(psutil.Error):
            return psutil.Process(self._popen.pid).children(recursive=True)
        return []

    def terminate(self) -> None:
        """Ask the whole group to end; returns at once, so that several can end together."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group: SIGTERM, five seconds, SIGKILL."""
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
        """Look at the memory, at most once a tick however much is printed."""
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
    """The command under a guard of the fork server; None where there is none."""
    address = fork_server()
    with suppress(ConnectionError):
        return Forked(address, command, cwd, env, keep) if address else None
    return None


def pause(seconds: float) -> None:
    """Sleep; Stopped as soon as every command is to stop."""
    if _closed.wait(seconds):
        raise Stopped


@contextmanager
def stopped_on_error() -> Iterator[None]:
    """If the body fails, stop every command, also those that other threads are about to start.

    So the threads that wait for them can end; Prefect alone would wait until the commands end by themselves.
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
