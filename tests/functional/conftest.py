"""Shared fixtures of functional tests: one Prefect server, and a finished toy pipeline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.functional.toy import Toy

Shared = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Create a folder once for all test workers: `shared(name, make)` calls `make(path)` in one of them."""
    base = tmp_path_factory.getbasetemp()
    home = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path, done = home / f"shared-{name}", home / f"shared-{name}.done"
        with FileLock(home / f"shared-{name}.lock"):
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)  # left by a failed worker
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def prefect_database(shared: Shared) -> Path:
    """An empty Prefect database, which each server copies, because creating one takes a dozen seconds."""

    def make(home: Path) -> None:
        command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
        env = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        subprocess.run(command, env=env, check=True, capture_output=True)

    return shared("prefect-database", make) / "prefect.db"


@pytest.fixture(scope="session")
def prefect_server(prefect_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real Prefect server with its own database; flows in this process use it."""
    from flows.server.ephemeral import quiet, server

    home, other = tmp_path_factory.mktemp("prefect"), tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_database, home)
    shutil.copy(prefect_database, other)  # for a run that starts its own server
    before = dict(os.environ)
    os.environ["PREFECT_HOME"] = str(home)
    os.environ.pop("PREFECT_API_URL", None)
    quiet(home)
    from prefect.context import refresh_global_settings_context

    with server(home) as prefect:
        assert prefect is not None
        prefect.wait()
        refresh_global_settings_context()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_HOME", str(other))
            url = os.environ["PREFECT_API_URL"]
            patch.delenv("PREFECT_API_URL")
            yield url
    os.environ.clear()
    os.environ.update(before)
    refresh_global_settings_context()


@pytest.fixture(scope="session")
def finished_toy(prefect_server: str, shared: Shared) -> Toy:
    """A toy pipeline after its first run; copy it, never change it."""
    return Toy(shared("finished-toy", lambda root: Toy.create(root).run()))


@pytest.fixture
def toy(finished_toy: Toy, tmp_path: Path) -> Toy:
    """A toy pipeline for this test, with everything up to date."""
    return finished_toy.copy(tmp_path / "toy")
