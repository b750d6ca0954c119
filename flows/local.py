"""Prefect for a run at a terminal: its settings, a server that ends with the run, and readable lines.

Prefect can start a temporary server by itself, but that one is left behind when the run is killed, dies of
the Ctrl-C that was meant for the run, and starts late. This one starts early and under a guard.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from flows.addresses import at_work
from flows.errors import FlowError
from flows.process import Process

START_SECONDS = 120.0  # the first start creates the database
RESTARTS = 5  # of one run's server: then something is wrong that a restart does not mend


def quiet(root: Path) -> None:
    """Settings that must stand before Prefect, MLflow and DVC are imported; what a person has set stays."""
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
        # a server that is away is noticed in seconds; MLflow's own patience is minutes
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "DVC_NO_ANALYTICS": "1",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


class Server:
    """A Prefect server on 127.0.0.1 for this run alone; one that dies is started again, at the same address.

    Without that, everything that the run says to Prefect would be tried for half a minute, in vain.
    """

    def __init__(self, start: Callable[[], Process], url: str, log: Path) -> None:
        self._start = start
        self._process = start()
        self._url = url
        self._log = log
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._keep_alive, daemon=True)

    def close(self) -> None:
        """End it, with all that belongs to it."""
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
        """Return when it answers; FlowError with the end of its log if it does not."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.alive:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self._url}/health", timeout=5):  # noqa: S310
                self._watch.start()  # from now on its end is an accident, not a reason to give up
                return
            time.sleep(0.1)
        words = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = words[-1] if words else "it gave no reason"
        raise FlowError(f"the Prefect server did not start: {reason} (log: {self._log}); run `modelpress doctor`")


@contextlib.contextmanager
def server(root: Path) -> Iterator[Server | None]:
    """Start a server and point Prefect at it (call its `wait` first).

    None where one is there: the one that PREFECT_API_URL names, or that of `modelpress serve`, whose database two
    servers must not share.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield None
        return
    if (addresses := at_work(root)) is not None:
        os.environ["PREFECT_API_URL"] = addresses.api
        try:
            yield None
        finally:
            _send_the_rest()
            del os.environ["PREFECT_API_URL"]
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}/api"
    log = root / ".modelpress/logs/prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", "127.0.0.1", "--port", port, "--log-level", "error"]
    env = {
        **os.environ,
        # what Prefect sets for its own temporary server: no UI, no schedules, no analytics
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
                _send_the_rest()
            finally:
                del os.environ["PREFECT_API_URL"]
                prefect.close()


def _send_the_rest() -> None:
    """Logs and events not sent yet: once the server is gone, Prefect would wait for it for minutes."""
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        APILogWorker.drain_all(timeout=5)
        EventsWorker.drain_all(timeout=5)
