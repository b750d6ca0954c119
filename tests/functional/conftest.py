"""What functional tests share: one Prefect server, and a finished toy pipeline to start from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional.toy import Toy


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real Prefect server with a database of its own; flows in this process use it."""
    from flows.local import quiet

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.delenv("PREFECT_API_URL", raising=False)
        before = dict(os.environ)
        quiet(tmp_path_factory.mktemp("home"))
        from prefect.settings import PREFECT_API_URL
        from prefect.testing.utilities import prefect_test_harness

        with prefect_test_harness(server_startup_timeout=120):
            url = PREFECT_API_URL.value()
            assert url
            yield url
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def finished_toy(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A toy pipeline after its first run; copy it, never change it."""
    toy = Toy.create(tmp_path_factory.mktemp("finished") / "toy")
    toy.run()
    return toy


@pytest.fixture
def toy(finished_toy: Toy, tmp_path: Path) -> Toy:
    """A toy pipeline of this test's own in which everything is up to date."""
    return finished_toy.copy(tmp_path / "toy")
