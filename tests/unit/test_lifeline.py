"""A bundle's lifeline.py with real processes: a lost peer ends all ranks, a signal ends them in order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tasks.deployment import lifeline
from tasks.deployment.arguments import DRAIN
from tests.caddy import free_port
from tests.waiting import soon

HOST = "127.0.0.1"
BEAT, SILENCE = 0.1, 2.0  # seconds
QUICK = (f"--heartbeat={BEAT}", f"--silence={SILENCE}", "--grace=0.5", "--linger=0.1")
# a command with a process of its own; after SIGTERM it writes its answer and ends, but only if the others still run
CHILD = """
import os, pathlib, signal, subprocess, sys, time
own, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
def end(*_):
    own.with_suffix(".told").touch()
    time.sleep(seconds)
    others = [p for p in own.parent.glob("*.pid") if p != own]
    alive = [p for p in others if pathlib.Path(f"/proc/{p.read_text()}").exists()]
    own.with_suffix(".answer").write_text(str(len(alive)))
    sys.exit(int(sys.argv[3]))
signal.signal(signal.SIGTERM, end)
subprocess.Popen(["sleep", "600"])
own.with_suffix(".new").write_text(str(os.getpid()))
own.with_suffix(".new").rename(own)
time.sleep(600)
"""
# vLLM's metrics: a request is running until so many seconds after they were first asked for; SIGTERM notes the time
METRICS = """
import http.server, pathlib, signal, sys, threading, time
own, port, seconds, start = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        start.append(time.monotonic())
        running = float(time.monotonic() - start[0] < seconds)
        lines = ['# HELP', 'vllm:num_requests_waiting{engine="0"} 0.0', 'vllm:num_requests_running{engine="0"} 0.0']
        lines.append(f'vllm:num_requests_running{{engine="1"}} {running}')
        self.send_response(200)
        self.end_headers()
        self.wfile.write('\\n'.join(lines).encode())
    def log_message(self, *_):
        pass
def end(*_):
    own.with_suffix(".answer").write_text(str(time.monotonic() - start[0]))
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
own.touch()
time.sleep(600)
"""


class Group:
    """The ranks of a group as processes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.port = folder, size, free_port()
        self.ranks: dict[int, subprocess.Popen[str]] = {}
        self.seen: list[psutil.Process] = []

    def start(
        self, rank: int, *options: str, drains: float = 0, status: int = 0, command: Sequence[str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a rank, whose command takes `drains` seconds to end after SIGTERM, with `status`."""
        own = [f"--leader={HOST}", f"--port={self.port}", f"--rank={rank}", f"--size={self.size}", *QUICK, *options]
        given = command or [sys.executable, "-c", CHILD, str(self.pid(rank)), str(drains), str(status)]
        self.pid(rank).unlink(missing_ok=True)
        with self.log(rank).open("w") as log:
            self.ranks[rank] = subprocess.Popen(
                [sys.executable, lifeline.__file__, *own, "--", *given], stderr=log, text=True
            )
        return self.ranks[rank]

    def start_all(self, drains: float = 0, status: int = 0) -> None:
        """Start all ranks, and wait until they are connected and their commands run."""
        for rank in range(self.size):
            self.start(rank, drains=drains, status=status)
        self.wait_connected()

    def wait_connected(self) -> None:
        assert soon(lambda: f"all {self.size} ranks are connected" in self.text(0), 10), self.text(0)
        assert soon(lambda: all(self.pid(rank).exists() for rank in self.ranks), 10)
        self.seen += [p for one in self.ranks.values() for p in psutil.Process(one.pid).children(recursive=True)]
        assert len(self.seen) == 2 * self.size

    def pid(self, rank: int) -> Path:
        """The file with the id of a rank's command."""
        return self.folder / f"{rank}.pid"

    def log(self, rank: int) -> Path:
        return self.folder / f"{rank}.log"

    def text(self, rank: int) -> str:
        return self.log(rank).read_text()

    def answer(self, rank: int) -> str | None:
        """The number of other commands that were running when a rank's command ended in order; None if it did not."""
        path = self.folder / f"{rank}.answer"
        return path.read_text() if path.exists() else None

    def status(self, rank: int, seconds: float = 5) -> int:
        """The exit status of a rank, which ends within so many seconds."""
        return self.ranks[rank].wait(seconds)

    def lose(self, rank: int) -> None:
        """Kill all processes of a machine."""
        self.ranks[rank].kill()
        os.killpg(int(self.pid(rank).read_text()), signal.SIGKILL)

    def nothing_is_left(self) -> bool:
        """Whether no process of a command runs any more."""
        return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in self.seen)

    def end(self) -> None:
        for one in self.ranks.values():
            with suppress(psutil.NoSuchProcess):
                self.seen += psutil.Process(one.pid).children(recursive=True)
            one.kill()
            one.wait()
        for process in self.seen:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Callable[[int], Group]]:
    """A group of a size."""
    made = []

    def make(size: int) -> Group:
        made.append(Group(tmp_path, size))
        return made[-1]

    yield make
    for one in made:
        one.end()


class TestLoss:
    @pytest.mark.parametrize("lost", [0, 2])
    def test_all_end_at_once_when_one_is_killed(self, group: Callable[[int], Group], lost: int) -> None:
        ranks = group(3)
        ranks.start_all()
        ranks.lose(lost)
        for rank in {0, 1, 2} - {lost}:
            assert ranks.status(rank, 2) == lifeline.LOST
            assert f"lifeline of rank {rank}: rank {lost} is lost: " in ranks.text(rank)
            assert ranks.answer(rank) is None  # killed, not told
        assert soon(ranks.nothing_is_left, 2)

    @pytest.mark.parametrize("lost", [0, 1])
    def test_silence_is_a_loss(self, group: Callable[[int], Group], lost: int) -> None:
        """A cut network sends no end of the connection, and neither does a stopped process."""
        ranks = group(2)
        ranks.start_all()
        ranks.ranks[lost].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert ranks.status(1 - lost) == lifeline.LOST
        assert SILENCE / 2 < time.monotonic() - start < SILENCE + 2
        assert f"rank {lost} is lost: silent for {SILENCE:g} s" in ranks.text(1 - lost)
        ranks.ranks[lost].send_signal(signal.SIGCONT)
        assert ranks.status(lost) == lifeline.LOST
        assert soon(ranks.nothing_is_left, 2)

    def test_a_short_pause_is_none(self, group: Callable[[int], Group]) -> None:
        ranks = group(2)
        ranks.start_all()
        for rank in (0, 1):
            ranks.ranks[rank].send_signal(signal.SIGSTOP)
        time.sleep(SILENCE + 1)
        for rank in (0, 1):
            ranks.ranks[rank].send_signal(signal.SIGCONT)
        time.sleep(SILENCE + 1)
        assert [ranks.ranks[rank].poll() for rank in (0, 1)] == [None, None]

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_command_that_ends_by_itself_ends_the_others(self, group: Callable[[int], Group], rank: int) -> None:
        ranks = group(3)
        for other in {0, 1, 2} - {rank}:
            ranks.start(other)
        ranks.start(rank, command=["sh", "-c", "sleep 1; exit 7"])
        assert ranks.status(rank) == 7
        for other in {0, 1, 2} - {rank}:
            assert ranks.status(other) == lifeline.LOST

    def test_a_fault_while_the_group_ends_is_a_loss(self, group: Callable[[int], Group]) -> None:
        ranks = group(2)
        ranks.start_all(drains=20)
        ranks.ranks[0].terminate()
        assert soon((ranks.folder / "0.told").exists, 5)
        os.killpg(int(ranks.pid(1).read_text()), signal.SIGKILL)
        assert ranks.status(0) == lifeline.LOST
        assert ranks.answer(0) is None


class TestOrder:
    @pytest.mark.parametrize("told", [(0,), (0, 2, 1), (2, 0, 1), (1,)])
    def test_the_leader_answers_while_the_others_still_run(
        self, group: Callable[[int], Group], told: tuple[int, ...]
    ) -> None:
        ranks = group(3)
        ranks.start_all(drains=1.0, status=3)
        for rank in told:
            ranks.ranks[rank].terminate()
            time.sleep(0.1)
        for rank in range(3):
            own = 3 if rank == 0 else 0
            assert ranks.status(rank) == (own if rank in told else lifeline.LOST)
        assert ranks.answer(0) == "2"
        assert soon(ranks.nothing_is_left, 2)

    def test_a_rank_waits_for_its_own_signal(self, group: Callable[[int], Group]) -> None:
        """In Kubernetes, the container of a pod that is going to be replaced must not start again."""
        ranks = group(2)
        ranks.start(0)
        ranks.start(1, "--linger=20")
        ranks.wait_connected()
        ranks.ranks[0].terminate()
        assert ranks.status(0) == 0
        assert soon(ranks.nothing_is_left, 3)
        assert ranks.ranks[1].poll() is None
        ranks.ranks[1].terminate()
        assert ranks.status(1, 2) == 0

    def test_a_command_that_does_not_end_is_killed(self, group: Callable[[int], Group]) -> None:
        ranks = group(2)
        for rank in (0, 1):
            ranks.start(rank, "--drain=0.5", drains=60)
        ranks.wait_connected()
        ranks.ranks[1].terminate()
        ranks.ranks[0].terminate()
        assert ranks.status(0) == 128 + signal.SIGKILL
        assert ranks.status(1) == 0
        assert soon(ranks.nothing_is_left, 2)

    @pytest.mark.parametrize(("seconds", "answers", "expected"), [(1.0, 10, 1.0), (60, 0.5, 0.5), (0, 10, 0)])
    def test_requests_are_answered_before_the_command_is_told(
        self, group: Callable[[int], Group], seconds: float, answers: float, expected: float
    ) -> None:
        ranks, port = group(2), free_port()
        command = [sys.executable, "-c", METRICS, str(ranks.pid(0)), str(port), str(seconds)]
        ranks.start(0, f"--metrics={port}", f"--answers={answers}", command=command)
        ranks.start(1)
        assert soon(lambda: "connected to rank 0" in ranks.text(1) and ranks.pid(0).exists(), 10)
        for rank in (1, 0):
            ranks.ranks[rank].terminate()
            time.sleep(0.1)
        assert [ranks.status(rank) for rank in (0, 1)] == [0, 0]
        assert expected - BEAT <= float(ranks.answer(0) or "nan") < expected + 1

    def test_a_second_signal_does_not_wait(self, group: Callable[[int], Group]) -> None:
        ranks, port = group(1), free_port()
        ranks.start(0, f"--metrics={port}", command=[sys.executable, "-c", METRICS, str(ranks.pid(0)), str(port), "60"])
        assert soon(ranks.pid(0).exists, 10)
        ranks.ranks[0].terminate()
        time.sleep(1)
        assert ranks.ranks[0].poll() is None
        ranks.ranks[0].terminate()
        assert ranks.status(0, 2) == 0

    def test_a_command_without_metrics_is_told_at_once(self, group: Callable[[int], Group]) -> None:
        ranks = group(1)
        ranks.start(0, f"--metrics={free_port()}")
        assert soon(ranks.pid(0).exists, 10)
        ranks.ranks[0].terminate()
        assert ranks.status(0, 2) == 0

    def test_a_rank_without_a_leader_passes_the_signal_on(self, group: Callable[[int], Group]) -> None:
        ranks = group(2)
        ranks.start(1, status=4)
        assert soon(ranks.pid(1).exists, 5)
        ranks.ranks[1].send_signal(signal.SIGINT)
        assert ranks.status(1) == 4

    def test_the_limits_fit_vllm_s(self) -> None:
        options = lifeline.read_options(["--leader=a", "--port=1", "--rank=0", "--size=2", "--", "true"])
        assert options.answers == DRAIN  # vLLM's own
        assert options.drain > DRAIN + options.grace  # it is killed only if it hangs
        assert options.silence + options.heartbeat <= 7  # requests end within 10 s


class TestJoining:
    def test_the_leader_may_come_late_and_its_name_unknown(self, group: Callable[[int], Group]) -> None:
        ranks = group(2)
        ranks.start(1)
        lost = Group(ranks.folder, 3)
        lost.port = ranks.port
        lost.start(2, "--leader=no-such-name.invalid")
        time.sleep(SILENCE + 1)
        assert ranks.ranks[1].poll() is lost.ranks[2].poll() is None
        lost.end()
        ranks.start(0)
        ranks.wait_connected()

    def test_a_rank_that_starts_again_ends_the_group_before_it_joins_again(self, group: Callable[[int], Group]) -> None:
        """vLLM, too, takes a rank only once."""
        ranks = group(3)
        ranks.start(0)
        ranks.start(1)
        assert soon(lambda: "connected to rank 0" in ranks.text(1) and ranks.pid(1).exists(), 5)
        ranks.lose(1)
        ranks.start(1)
        assert ranks.status(0) == lifeline.LOST
        ranks.start(2)
        ranks.start(0)  # on the same port
        ranks.wait_connected()

    def test_a_stranger_is_no_rank(self, group: Callable[[int], Group]) -> None:
        ranks = group(2)
        ranks.start(0)
        assert soon(ranks.pid(0).exists, 5)
        hello = b"lifeline 1 1 2\n"
        for sent in (
            *(
                b"",
                b"\n",
                b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
                b"x" * 100_000,
                b"\xff\xfe\n",
                b"leaving\n",
                b"lost 1\n",
            ),
            *(b"lifeline 1 0 2\n", b"lifeline 1 2 2\n", b"lifeline 1 -1 2\n", b"lifeline 1 1 3\n", b"lifeline 2 1 2\n"),
            *(hello.strip() + b" 1\n", hello.replace(b" ", b""), hello.replace(b"1 2", "²".encode())),
        ):
            with socket.create_connection((HOST, ranks.port), 2) as stranger:
                with suppress(OSError):
                    stranger.sendall(sent)
                stranger.settimeout(SILENCE + 1)
                with suppress(ConnectionResetError):
                    assert stranger.recv(100) == b"", sent
        silent = [socket.create_connection((HOST, ranks.port), 2) for _ in range(50)]
        ranks.start(1)
        ranks.wait_connected()
        for one in silent:
            one.close()
        with pytest.raises(ConnectionRefusedError):  # nobody is awaited any more
            socket.create_connection((HOST, ranks.port), 2)
        time.sleep(SILENCE)
        assert ranks.ranks[0].poll() is None
        assert "Traceback" not in ranks.text(0)

    def test_a_rank_is_not_taken_twice(self, group: Callable[[int], Group]) -> None:
        ranks = group(3)
        ranks.start(0)
        ranks.start(1)
        assert soon(lambda: "connected to rank 0" in ranks.text(1), 5)
        second = Group(ranks.folder / "second", 3)
        second.folder.mkdir()
        second.port = ranks.port
        second.start(1)
        assert soon(lambda: "rank 0 does not accept rank 1 of 3; trying again" in second.text(1), 5)
        second.end()
        ranks.start(2)
        ranks.wait_connected()

    def test_words_that_are_unknown_do_nothing(self, group: Callable[[int], Group]) -> None:
        ranks = group(2)
        ranks.start(0)
        assert soon(ranks.pid(0).exists, 5)
        with socket.create_connection((HOST, ranks.port), 2) as peer:
            peer.sendall(b"lifeline 1 1 2\n")
            assert peer.recv(100).startswith(b"welcome\n")
            for _ in range(10):
                peer.sendall(b"\nending\nlost 0\nlost\nrm -rf /\n")
                time.sleep(BEAT)
            assert ranks.ranks[0].poll() is None
            peer.sendall(b"x" * 1000)
            assert ranks.status(0) == lifeline.LOST


class TestProgram:
    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, lifeline.__file__, *arguments], capture_output=True, text=True)

    def test_the_command_gets_its_words_and_gives_its_status(self) -> None:
        own = ("--leader=a", f"--port={free_port()}", "--rank=0", "--size=1", f"--host={HOST}")
        shown = self.run(*own, "--", sys.executable, "-c", "import sys; print(sys.argv[1:])", "--rank=9", "--", "-x")
        assert (shown.returncode, shown.stdout) == (0, "['--rank=9', '--', '-x']\n")
        assert self.run(*own, "--", "sh", "-c", "exit 5").returncode == 5
        assert self.run(*own, "--", "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (["--rank=2"], "--rank is 2; expected a number from 0 to below --size, which is 2"),
            (["--silence=1.5"], "--silence is 1.5; expected at least twice --heartbeat"),
            (["--si=2"], "unrecognized arguments"),
        ],
    )
    def test_wrong_options_are_refused(self, changes: list[str], message: str) -> None:
        done = self.run("--leader=a", "--port=1", "--rank=0", "--size=2", *changes, "--", "true")
        assert done.returncode == 2
        assert message in done.stderr
        assert "expected -- and a command" in self.run("--leader=a", "--port=1", "--rank=0", "--size=2").stderr

    def test_what_cannot_start_is_said_in_one_line(self) -> None:
        with socket.create_server((HOST, 0)) as used:
            port = used.getsockname()[1]
            own = ("--leader=a", "--rank=0", "--size=2", f"--host={HOST}")
            done = self.run(*own, f"--port={port}", "--", "true")
        assert done.returncode == 1
        assert f"rank 0: cannot listen on {HOST}, port {port}: " in done.stderr
        missing = self.run(*own, f"--port={port}", "--", "no-such-program")
        assert missing.returncode == 1
        assert "No such file or directory: 'no-such-program'" in missing.stderr
        assert {text.count("\n") for text in (done.stderr, missing.stderr)} == {1}

    def test_it_needs_only_the_standard_library(self) -> None:
        bare = [sys.executable, "-I", "-S", lifeline.__file__, "--help"]
        assert "Run the command of one machine" in subprocess.run(bare, capture_output=True, text=True).stdout
