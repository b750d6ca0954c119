"""Start a server in a process group of its own, wait until it answers, and stop it."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tasks.errors import TaskError

GUARD = Path(__file__).with_name("guard.py")
LIMIT = 1800.0  # seconds until the health address answers: a large model is read from disk, and may be compiled
TICK = 0.5  # seconds between looks at the health address
TOLD = 15.0  # seconds between lines of progress
GRACE = 20.0  # seconds between SIGTERM and SIGKILL
LINES = 6  # of a log's last words, unless it names an error
WIDEST = 400  # characters of such a line
REASONS = 5  # lines after an error that announces them

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# what loggers write before a message: (EngineCore pid=7) ERROR 11-29 10:00:00 [core.py:1]
_BEFORE = re.compile(r"^(\([^)]*pid=\d+\)\s*)?([A-Z]+ \d\d-\d\d [\d:.,]+ )?(\[[\w./]+:\d+\]\s*)?")
_ERROR = re.compile(r"^[\w.]*(Error|Exception)\b: \S")
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/:'\"]+/)+")  # of an absolute path
_POINTER = re.compile(r"[Ss]ee root cause|[Ss]ee stack trace")  # an error that names no cause


class NotServed(TaskError):  # noqa: N818 - a finding, not always an error
    """A server that did not start, or ended. reason: in a few words; last_words: of its log."""

    def __init__(self, reason: str, last_words: str) -> None:
        super().__init__(f"{reason}; its last words: {last_words or 'none'}")
        self.reason, self.last_words = reason, last_words


class NotServableHere(TaskError):  # noqa: N818
    """A model that the engine can serve, but not on this machine. reason: why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Launch:
    """A server to start. command: with the paths of this machine; shown: the same for a report, without them.

    environment: all variables of the process. health: the path that answers 200 when it is ready.
    """

    engine: str
    version: str
    name: str
    port: int
    command: Sequence[str]
    shown: Sequence[str]
    environment: Mapping[str, str]
    health: str


class Server:
    """A running server.

    url: without a path. name: of the served model. pid: of the server, whose group has the same number. command: how it
    was started, without paths of this machine. start_seconds: from the start to the first answer.
    """

    def __init__(self, launch: Launch, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = f"http://127.0.0.1:{launch.port}"
        self.name, self.engine, self.version = launch.name, launch.engine, launch.version
        self.command = list(launch.shown)
        self.pid = process.pid
        self.start_seconds = 0.0
        self._process, self._log, self._health = process, log, launch.health

    @property
    def alive(self) -> bool:
        """Whether the server's own process runs."""
        return self._process.poll() is None

    def cpu_seconds(self) -> float:
        """Processor time of the server and the processes that it started, seconds; 0 after its end."""
        total = 0.0
        for process in self._tree():
            with suppress(psutil.Error):
                times = process.cpu_times()
                # those of ended children, where the system keeps them
                ended = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
                total += times.user + times.system + ended
        return total

    def peak_memory_bytes(self) -> int:
        """The sum of each process's largest resident memory so far, bytes; memory that they share counts in each.

        Where the system does not tell the largest: the memory now.
        """
        return sum(_peak(process) for process in self._tree())

    def last_words(self) -> str:
        """The errors at the end of the log, or its last lines, without paths of this machine."""
        return last_words(self._log)

    def wait_until_ready(self, limit: float = LIMIT) -> None:
        """Wait for the health address, with a line of progress now and then; NotServed if it does not answer."""
        started = told = time.monotonic()
        with httpx.Client(trust_env=False, timeout=10) as client:
            while True:
                with suppress(httpx.HTTPError):
                    if client.get(self.url + self._health).status_code == httpx.codes.OK:
                        self.start_seconds = round(time.monotonic() - started, 1)
                        return
                now = time.monotonic()
                if not self.alive:
                    raise NotServed(f"{self.engine} ended with status {self._process.poll()}", self.last_words())
                if now - started > limit:
                    raise NotServed(f"{self.engine} was not ready after {limit:.0f} s", self.last_words())
                if now - told > TOLD:
                    told = now
                    print(f"{self.engine} starts with {self.name}: {now - started:.0f} s", flush=True)
                time.sleep(TICK)

    def ends_within(self, seconds: float) -> bool:
        """Whether the server's process ends in this time."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return not self.alive

    def stop(self) -> None:
        """End the server: SIGTERM, and after a while SIGKILL for all that is left of its group."""
        if self.alive:
            self._process.terminate()
            self.ends_within(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def _tree(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.pid)
            return [own, *own.children(recursive=True)]
        except psutil.Error:
            return []


@contextmanager
def running(launch: Launch, log: Path) -> Iterator[Server]:
    """Start a server and stop it at the end, also if this process is killed. Its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(launch.command),
            cwd=log.parent,
            env=dict(launch.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # in a session of its own: what ends this process's group must not end the guard
    guard = subprocess.Popen(
        [sys.executable, "-I", str(GUARD), str(process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    server = Server(launch, process, log)
    try:
        yield server
    finally:
        server.stop()
        guard.kill()
        guard.communicate()


def free_port() -> int:
    """A port of this machine's loopback interface that nothing uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def last_words(log: Path) -> str:
    """The errors in the last part of a log, oldest first, or else its last lines, joined by " | "; without folders."""
    try:
        text = log.read_bytes()[-200_000:].decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    lines = [_BEFORE.sub("", _COLOUR.sub("", line)).strip() for line in text.splitlines()]
    lines = list(dict.fromkeys(line for line in lines if line))
    errors = [_with_reasons(lines[place:]) for place, line in enumerate(lines) if _ERROR.match(line)]
    causes = [line for line in errors if not _POINTER.search(line)]
    return _FOLDERS.sub("", " | ".join(line[:WIDEST] for line in (causes or errors or lines)[-LINES:]))


def _with_reasons(lines: Sequence[str]) -> str:
    """The first line, and those after it that it announces with a colon at its end."""
    if not lines[0].endswith(":"):
        return lines[0]
    reasons = itertools.takewhile(lambda line: "cannot" in line or line.startswith("-"), lines[1:])
    return " ".join((lines[0], "; ".join(itertools.islice(reasons, REASONS))))


def _peak(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
            return int(found[1]) * 1024
        return int(process.memory_info().rss)
    except (OSError, psutil.Error):
        try:
            return int(process.memory_info().rss)
        except psutil.Error:
            return 0
