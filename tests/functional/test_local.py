"""The Prefect server of a run."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from flows.errors import FlowError
from flows.server.ephemeral import Server, free_port, quiet, server
from tests.waiting import soon


def test_a_server_that_dies_is_started_again_and_ends_with_the_run(
    prefect_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which nothing answers, and no_proxy is not set
    _settings(tmp_path, monkeypatch)
    shutil.copytree(prefect_database.parent, tmp_path / ".prefect")
    with server(tmp_path) as prefect:
        assert prefect is not None
        prefect.wait()
        (first,) = _uvicorn(prefect)
        os.kill(first.pid, signal.SIGKILL)
        assert soon(_answers, 120)
        (second,) = _uvicorn(prefect)
        assert second.pid != first.pid
    assert not second.is_running()
    assert _uvicorn(prefect) == []


@pytest.mark.slow
def test_another_server_at_its_port_is_not_mistaken_for_it(
    prefect_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _settings(tmp_path, monkeypatch)
    shutil.copytree(prefect_database.parent, tmp_path / ".prefect")
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        threading.Thread(target=_hang_up, args=(stranger,), daemon=True).start()
        monkeypatch.setattr("flows.server.ephemeral.free_port", lambda: stranger.getsockname()[1])
        with server(tmp_path) as prefect:
            assert prefect is not None
            with pytest.raises(FlowError, match=r"did not start: .*address already in use"):
                prefect.wait()


def test_ports_in_use_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        monkeypatch.setattr("random.sample", lambda ports, _: [taken, *ports[:50]])
        assert free_port() != taken
        monkeypatch.setattr("random.sample", lambda *_: [taken])
        with pytest.raises(FlowError, match="no free port"):
            free_port()


def _settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # `quiet` changes only this test's environment
    quiet(home)


def test_the_users_exceptions_from_the_proxy_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _settings(tmp_path, monkeypatch)
    os.environ.pop("no_proxy")
    os.environ["NO_PROXY"] = "hub.example,localhost"
    quiet(tmp_path)
    quiet(tmp_path)
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "hub.example,localhost,127.0.0.1,::1"


def _hang_up(listener: socket.socket) -> None:
    """Answer alternately with nothing and with non-HTTP bytes."""
    with suppress(OSError):
        for answer in itertools.cycle([b"", b"hello\r\n"]):
            with listener.accept()[0] as caller:
                caller.recv(1000)
                caller.sendall(answer)


def _uvicorn(at: Server) -> list[psutil.Process]:
    port = str(urlsplit(at.url).port)
    return [p for p in psutil.Process().children(recursive=True) if _runs_uvicorn(p, port)]


def _runs_uvicorn(process: psutil.Process, port: str) -> bool:
    try:
        words = process.cmdline()
    except psutil.NoSuchProcess:  # also a zombie
        return False
    return words[1:4] == ["-P", "-m", "uvicorn"] and port in words


def _answers() -> bool:
    try:
        with urllib.request.urlopen(f"{os.environ['PREFECT_API_URL']}/health", timeout=30):
            return True
    except OSError:
        return False
