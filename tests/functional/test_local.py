"""The Prefect server that a run starts for itself."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from flows.local import quiet, server


def test_a_server_that_dies_is_started_again_and_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what `quiet` sets stays in this test
    quiet(tmp_path)
    with server(tmp_path) as prefect:
        assert prefect is not None
        prefect.wait()
        (first,) = _uvicorn()
        os.kill(first.pid, signal.SIGKILL)
        end = time.monotonic() + 60
        while not _answers() and time.monotonic() < end:
            time.sleep(0.1)
        (second,) = _uvicorn()
        assert second.pid != first.pid
        assert _answers()
    assert not second.is_running()
    assert _uvicorn() == []


def _uvicorn() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.cmdline()[1:4] == ["-P", "-m", "uvicorn"]]


def _answers() -> bool:
    try:
        with urllib.request.urlopen(f"{os.environ['PREFECT_API_URL']}/health", timeout=5):
            return True
    except OSError:
        return False
