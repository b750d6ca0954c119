"""`modelpress serve`: Prefect's server and UI, a worker, the deployments in prefect.yaml, and MLflow's UI.

All services listen on 127.0.0.1 by default, end with this process, and are restarted if they die.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import psutil

from flows.errors import FlowError
from flows.graph.params_file import read_settings
from flows.processes.process import GRACE, Process
from flows.processes.run_module import run_module, stage_environment
from flows.server.addresses import Addresses, announced, at_work
from flows.server.links import form_link, runs_link
from flows.tracking.mlflow_run import open_store
from flows.tracking.prefect_artifacts import MLFLOW_UI

POOL = "modelpress"
LOGS = Path(".modelpress/logs")
START_SECONDS = 120.0
RESTARTS = 5  # per service and minute; more restarts would not help


@dataclass
class _Service:
    """A program to start. health: the URL that answers once it is ready; None: do not wait."""

    name: str
    command: list[str]
    health: str | None = None
    deaths: list[float] = field(default_factory=list)


def serve(root: Path, host: str, port: int, mlflow_port: int, say: Callable[[str], None]) -> None:
    """Start all services and keep them running until a KeyboardInterrupt. say: prints a line.

    If a server is already running, print its addresses and return. FlowError if a port is taken, the settings are
    invalid (the form needs them for its defaults), or a service does not start.
    """
    if (found := at_work(root)) is not None:
        _say_addresses(root, found, say)
        say("the service is already running; nothing was started")
        return
    read_settings(root / "params.yaml")
    if host not in ("127.0.0.1", "localhost", "::1"):
        say(f"listening on {host}: everyone who reaches it can start runs, because there is no password")
    mine = os.environ.get("PREFECT_API_URL")
    prefect = mine.removesuffix("/api") if mine else f"http://{host}:{port}"
    addresses = Addresses(prefect, f"http://{host}:{mlflow_port}")
    for wanted in ([] if mine else [port]) + [mlflow_port]:
        _require_free(host, wanted)
    _environment(root, addresses)
    open_store(root)  # create it now, so that MLflow's server and a first run do not both try
    services = [*([] if mine else [_server(host, port)]), _mlflow(root, host, mlflow_port), _worker()]
    with announced(root, addresses), contextlib.ExitStack() as stack:
        running: dict[str, Process] = {}
        for service in services:
            if service.name == "worker":
                _deploy(root)
            say(f"starting {service.name}")
            running[service.name] = stack.enter_context(_start(root, service))
            _wait(root, service, running[service.name])
        _say_addresses(root, addresses, say)
        say("press Ctrl-C to stop")
        try:
            while True:
                time.sleep(1)
                for service in services:
                    if not running[service.name].alive:
                        _count_death(root, service)
                        say(f"{service.name} has ended; restarting it")
                        running[service.name] = stack.enter_context(_start(root, service))
                        _wait(root, service, running[service.name])
        finally:
            if "worker" in running:
                _end_runs(running["worker"])
            for process in running.values():
                process.terminate()


def _end_runs(worker: Process) -> None:
    """End the active flow runs, which have separate process groups, while the server can still record it."""
    runs = [process for process in worker.descendants() if _is_run(process)]
    for run in runs:
        with contextlib.suppress(psutil.Error):
            run.terminate()
    for run in psutil.wait_procs(runs, timeout=2 * GRACE)[1]:
        with contextlib.suppress(psutil.Error):
            run.kill()


def _is_run(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "prefect.engine" in process.cmdline()
    return False


def _server(host: str, port: int) -> _Service:
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "server", "start"]
    command += ["--host", host, "--port", str(port), "--log-level", "WARNING", "--analytics-off"]
    return _Service("prefect-server", command, f"http://{host}:{port}/api/health")


def _mlflow(root: Path, host: str, port: int) -> _Service:
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    command += ["--backend-store-uri", store, "--default-artifact-root", (root / "mlruns").as_uri()]
    return _Service("mlflow", command, f"http://{host}:{port}/health")


def _worker() -> _Service:
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "worker", "start", "--pool", POOL]
    return _Service("worker", [*command, "--type", "process", "--install-policy", "never"])


def _environment(root: Path, addresses: Addresses) -> None:
    os.environ["PREFECT_API_URL"] = addresses.api
    os.environ["PREFECT_SERVER_UI_API_URL"] = addresses.api
    os.environ["PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT"] = "false"
    os.environ["PREFECT_WORKER_WEBSERVER_HOST"] = "127.0.0.1"
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # eight processes that are not needed
    os.environ[MLFLOW_UI] = addresses.mlflow
    # the worker's runs import this checkout's code from any folder
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])


def _start(root: Path, service: _Service) -> Process:
    log = root / LOGS / f"{service.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return Process(service.command, root, stage_environment(os.environ), output=file.fileno())


def _wait(root: Path, service: _Service, process: Process) -> None:
    """Wait until the service answers; FlowError with the last line of its log if it does not."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.alive:
        if service.health is None:
            return
        with contextlib.suppress(OSError, HTTPException), urllib.request.urlopen(service.health, timeout=5):  # noqa: S310
            return
        time.sleep(0.2)
    raise FlowError(f"{service.name} did not start: {_last_line(root, service)}")


def _count_death(root: Path, service: _Service) -> None:
    now = time.monotonic()
    service.deaths = [then for then in service.deaths if now - then < 60] + [now]
    if len(service.deaths) > RESTARTS:
        raise FlowError(f"{service.name} ended {RESTARTS} times within a minute: {_last_line(root, service)}")


def _last_line(root: Path, service: _Service) -> str:
    log = root / LOGS / f"{service.name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no error message"]
    return f"{lines[-1].strip()} (log: {log})"


def _deploy(root: Path) -> None:
    """Create the work pool and all deployments in prefect.yaml with Prefect's commands."""
    for arguments in (["work-pool", "create", POOL, "--type", "process", "--overwrite"], ["deploy", "--all"]):
        status, said = run_module(root, "prefect", "--no-prompt", *arguments)
        if status:
            lines = [line for line in said if line.strip()] or ["no error message"]
            raise FlowError(f"`prefect {' '.join(arguments)}` failed: {lines[-1].strip()}")


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FlowError(
                f"cannot listen on {host}:{port}: {error.strerror}; stop the program on this port, or choose others "
                "with --port and --mlflow-port"
            ) from error


def _say_addresses(root: Path, addresses: Addresses, say: Callable[[str], None]) -> None:
    say(f"start a run     {form_link(addresses)}")
    say(f"runs, Prefect   {addresses.prefect}/runs")
    say(f"runs, MLflow    {runs_link(addresses, *open_store(root))}")
