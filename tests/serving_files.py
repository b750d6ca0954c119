"""Run the containers of a bundle's serve/ as processes on this machine: the commands, environments and probes of the
files, with addresses mapped to 127.0.0.1 and settings for vLLM's CPU build.

A supervisor does what the files ask of compose or LeaderWorkerSet: if a process ends or fails its liveness probe, all
are started again. It first gives them time to end by themselves, so a request must not wait for the supervisor.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.caddy import free_port
from tests.waiting import soon

ROOT = Path(__file__).resolve().parents[1]
PYTHON = os.environ.get("MODELPRESS_VLLM_PYTHON", "")
KEY = "a-key-for-tests"
HOST = "127.0.0.1"
PORT, RANKS_PORT, COPIES_PORT, LIFELINE_PORT = "8000", "29500", "13345", "13344"  # in the files
ENDS = 15  # seconds in which all processes must end by themselves after one is lost
# the automatic binding wants more cores than there are, and compiling takes minutes
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HOME": ""}
CPU_ARGUMENTS = ("--enforce-eager", "--max-model-len=1024")


@dataclass(frozen=True)
class Container:
    """What a file says about a container. period, failures: of the liveness probe, which asks /health."""

    command: list[str]
    environment: dict[str, str]
    period: float = 10
    failures: int = 6


def of_compose(bundle: Path) -> list[Container]:
    """The engine of serve/compose.yaml."""
    model = yaml.safe_load((bundle / "serve/compose.yaml").read_text())["services"]["model"]
    assert model["restart"] == "unless-stopped"
    return [Container([*model["entrypoint"], *model["command"]], model["environment"])]


def of_group(bundle: Path) -> list[Container]:
    """The engines of serve/kubernetes/leaderworkerset.yaml, the leader first."""
    spec = yaml.safe_load((bundle / "serve/kubernetes/leaderworkerset.yaml").read_text())["spec"]
    group = spec["leaderWorkerTemplate"]
    assert group["restartPolicy"] == "RecreateGroupAfterStart"
    found = []
    for rank in range(group["size"]):
        (container,) = group["workerTemplate" if rank else "leaderTemplate"]["spec"]["containers"]
        given = {one["name"]: one.get("value", KEY) for one in container["env"]}
        # what LeaderWorkerSet's controller adds
        given |= {"LWS_LEADER_ADDRESS": HOST, "LWS_WORKER_INDEX": str(rank), "LWS_GROUP_SIZE": str(group["size"])}
        command = [_expanded(word, given) for word in container["command"]]
        if rank:
            assert "livenessProbe" not in container  # it ends with the leader
            found.append(Container(command, given))
        else:
            probe = container["livenessProbe"]
            found.append(Container(command, given, probe["periodSeconds"], probe["failureThreshold"]))
    return found


def _expanded(word: str, environment: dict[str, str]) -> str:
    """Variables as Kubernetes writes them into a command: $(NAME)."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), word)


@dataclass
class Service:
    """The processes of all containers, and their supervisor. arguments: further ones, after those of the files.

    stayed: the ranks that did not end by themselves before the last start.
    """

    containers: Sequence[Container]
    bundle: Path
    folder: Path  # for logs and the home of the processes
    arguments: Sequence[str] = ()
    starts: int = 0
    stayed: list[int] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ports = {name: str(free_port()) for name in (PORT, RANKS_PORT, COPIES_PORT, LIFELINE_PORT)}
        self._ended = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)

    def __enter__(self) -> Service:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, program in (("vllm", f' "{ROOT / "tests/vllm_serve.py"}"'), ("python3", "")):
            (self.folder / name).write_text(f'#!/bin/sh\nexec "{PYTHON}"{program} "$@"\n')
            (self.folder / name).chmod(0o755)
        self._supervisor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._supervisor.join(60)
        self._kill_all()

    @property
    def url(self) -> str:
        """The address of the server."""
        return f"http://{HOST}:{self.ports[PORT]}"

    def wait(self, seconds: float) -> float:
        """Wait until it is healthy; the seconds that it took. AssertionError with the ends of the logs otherwise."""
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            if self.healthy():
                return time.monotonic() - start
            time.sleep(0.5)
        raise AssertionError(f"not healthy after {seconds} s:\n{self.logs()}")

    def healthy(self) -> bool:
        """Whether /health answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (OSError, urllib.error.URLError):
            return False

    def logs(self, lines: int = 25) -> str:
        """The ends of the logs of all processes."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def lose(self, rank: int) -> None:
        """Kill all processes of a machine at once."""
        _send(signal.SIGKILL, self.processes[rank])

    def cut(self, rank: int) -> None:
        """Stop all processes of a machine: no connection ends, but nothing arrives any more."""
        _send(signal.SIGSTOP, self.processes[rank])

    def end_in_order(self, ranks: Sequence[int], seconds: float) -> list[int | None]:
        """Tell the machines to end, in this order; their exit statuses after so many seconds. None starts again."""
        self._ended.set()
        self._supervisor.join(60)
        for rank in ranks:
            self.processes[rank].terminate()
            time.sleep(0.5)
        soon(lambda: all(process.poll() is not None for process in self.processes), seconds)
        return [process.poll() for process in self.processes]

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout: float = 120) -> Any:
        """The JSON answer to a request."""
        with self.open(path, body, timeout) as answer:
            return json.loads(answer.read())

    def stream(self, path: str, body: dict[str, Any], timeout: float = 120) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. EOFError if it ends before its end, RuntimeError for an error in it."""
        with self.open(path, body | {"stream": True}, timeout) as answer:
            for line in answer:
                text = line.decode().strip().removeprefix("data: ")
                if text == "[DONE]":
                    return
                if text:
                    event = json.loads(text)
                    if "error" in event:
                        raise RuntimeError(str(event["error"]))
                    yield event
        raise EOFError("the stream ended early")

    def open(self, path: str, body: dict[str, Any] | None = None, timeout: float = 120) -> Any:
        """The HTTP answer to a request."""
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body is not None else None
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=timeout)

    def _mapped(self, word: str) -> str:
        """A word of a command with the paths and ports of this machine."""
        for inside, here in self.ports.items():
            word = re.sub(rf"(?<=[=:]){inside}\b", here, word)
        return re.sub(r"/model\b", str(self.bundle), word)

    def _start_all(self) -> None:
        self.starts += 1
        self.processes = []
        ports = (f"--host={HOST}", f"--port={self.ports[PORT]}", f"--master-port={self.ports[RANKS_PORT]}")
        for rank, container in enumerate(self.containers):
            further = [*ports, *CPU_ARGUMENTS, *self.arguments]
            command = [self._mapped(word) for word in container.command]
            if "sh" in command:
                command[-1] = " ".join([command[-1], *further])
            else:
                command += further
            environment = {
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                **container.environment,
                "VLLM_API_KEY": KEY,
                "VLLM_HOST_IP": HOST,
                **CPU,
                "HOME": str(self.folder),
            }
            with (self.folder / f"rank{rank}-{self.starts}.log").open("wb") as log:
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )

    def _kill_all(self) -> None:
        for process in self.processes:
            _send(signal.SIGKILL, process)
            with suppress(ProcessLookupError):  # what is left of a process that has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)

    def _wait_for_ends(self) -> None:
        """Wait until all processes have ended by themselves."""
        deadline = time.monotonic() + ENDS
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            if self._ended.wait(0.1):
                return
        self.stayed = [rank for rank, process in enumerate(self.processes) if process.poll() is None]

    def _supervise(self) -> None:
        """Start all; if one ends or fails its probe too often, start all again."""
        self._start_all()
        started, failed, asked = False, 0, time.monotonic()
        while not self._ended.wait(0.3):
            started = started or self.healthy()
            lost = any(process.poll() is not None for process in self.processes)
            if started and time.monotonic() > asked + self.containers[0].period:
                asked = time.monotonic()
                failed = 0 if self.healthy() else failed + 1
                lost = lost or failed >= self.containers[0].failures
            if lost:
                self._wait_for_ends()
                self._kill_all()
                if self._ended.is_set():
                    return
                self._start_all()
                started, failed, asked = False, 0, time.monotonic()


def _send(number: signal.Signals, process: subprocess.Popen[bytes]) -> None:
    """Send a signal to a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        for one in (own := psutil.Process(process.pid), *own.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)
