"""Prefect for a run at a terminal: its settings, and a server that ends with the run.

Prefect's own temporary server keeps running after the run is killed, ends on the Ctrl-C meant for the run, and starts
late. This one starts early and under a guard.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path

from flows.errors import FlowError
from flows.processes.process import Process
from flows.server.addresses import at_work

START_SECONDS = 120.0  # the first start creates the database
PORTS = range(10_000, 32_768)  # below the ephemeral ports of Linux, macOS and Windows
RESTARTS = 5  # per run; more restarts would not help
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def quiet(root: Path) -> None:
    """Set the environment for Prefect, MLflow and DVC; call it before their import. The user's settings are kept."""
    defaults = {
        "PREFECT_HOME": str(root / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_CLIENT_METRICS_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        # notice an unreachable server in seconds instead of MLflow's minutes
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "DVC_NO_ANALYTICS": "1",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # servers on this machine are never reached through a proxy; libraries read one name or the other
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    own = [name for name in LOOPBACK if name not in others.split(",")]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*filter(None, [others]), *own])


class Server:
    """A Prefect server on 127.0.0.1 for this run only. If it dies, it is restarted at the same address.

    Without the restart, every call to Prefect would be retried for half a minute and then fail.
    """

    def __init__(self, start: Callable[[], Process], url: str, log: Path) -> None:
        self._start = start
        self._process = start()
        self.url = url
        self._log = log
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._keep_alive, daemon=True)

    def close(self) -> None:
        """Stop the server and all its processes."""
        self._closing.set()
        if self._watch.is_alive():
            self._watch.join()
        self._process.kill()

    def _keep_alive(self) -> None:
        for _ in range(RESTARTS):
            while self._process.alive:
                if self._closing.wait(0.2):
                    return
            self._process.kill()
            self._process = self._start()

    def wait(self) -> None:
        """Wait until the server answers; FlowError with the cause from its log if it does not."""
        health = f"{self.url}/health"
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.alive:
            with contextlib.suppress(OSError, HTTPException), urllib.request.urlopen(health, timeout=5):  # noqa: S310
                self._watch.start()  # from now on, restart it if it ends
                return
            time.sleep(0.1)
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in lines if "Errno" in line]  # the first one causes the others
        reason = (errors[:1] or lines[-1:] or ["no error message"])[0]
        raise FlowError(f"the Prefect server did not start: {reason} (log: {self._log}); run `modelpress doctor`")


def free_port() -> int:
    """A free port of 127.0.0.1 outside the ephemeral range.

    A server needs ten seconds until it listens, and an ephemeral port may be taken by then. FlowError after a hundred
    attempts.
    """
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise FlowError("no free port found on 127.0.0.1; run `modelpress doctor`")


@contextlib.contextmanager
def server(root: Path) -> Iterator[Server | None]:
    """Start a server and point Prefect at it (call its `wait` before using Prefect).

    Yields None if a server exists already: at PREFECT_API_URL, or that of `modelpress serve`. Two servers must not
    share a database.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield None
        return
    if (addresses := at_work(root)) is not None:
        os.environ["PREFECT_API_URL"] = addresses.api
        try:
            yield None
        finally:
            _flush_logs()
            del os.environ["PREFECT_API_URL"]
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    log = root / ".modelpress/logs/prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    env = {
        **os.environ,
        # as for Prefect's own temporary server: no UI, no schedules, no analytics
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    with log.open("wb") as file:
        prefect = Server(lambda: Process(command, root, env, output=file.fileno()), url, log)
        os.environ["PREFECT_API_URL"] = url
        try:
            yield prefect
        finally:
            try:
                _flush_logs()
            finally:
                del os.environ["PREFECT_API_URL"]
                prefect.close()


def _flush_logs() -> None:
    """Send pending logs and events; once the server is gone, Prefect would wait for minutes."""
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        APILogWorker.drain_all(timeout=5)
        EventsWorker.drain_all(timeout=5)
