"""Shared fixtures."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # test files run in parallel: more threads would compete

import pytest
import torch

if not torch.cuda.is_available():
    # see tasks/quantizers/libraries/autoawq.py: not needed here, and it reports leaks when the process ends
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type]


from flows.processes.forked import SHARED, fork_server
from tasks.environments import is_made
from tests.tiny import Corpus, tiny_corpus, tiny_model

PROJECT = Path(__file__).resolve().parents[1]
LEFT_OUT = {"gpu": "needs an NVIDIA GPU", "slow": "takes minutes"}  # marker -> why


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --run-gpu and --run-slow, which include the tests with that marker."""
    for marker, why in LEFT_OUT.items():
        parser.addoption(f"--run-{marker}", action="store_true", help=f"also run tests marked {marker} ({why})")


def pytest_configure() -> None:
    """Restore Ctrl-C, which programs started in the background ignore, because tests interrupt their child processes.

    All tests and the programs that they start share one fork server, which refuses programs with another PYTHONPATH.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["PYTHONPATH"] = str(PROJECT)
    if SHARED not in os.environ and (address := fork_server()):
        os.environ[SHARED] = address


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip marked tests unless requested, and tests that need an extra that is not installed."""
    if not is_made("llama-cpp"):
        for item in items:
            if item.get_closest_marker("gguf"):
                item.add_marker(pytest.mark.skip(reason="needs llama.cpp: make gguf"))
    for marker, why in LEFT_OUT.items():
        if not config.getoption(f"--run-{marker}"):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"{why}: pytest --run-{marker}"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, trained a little, so that damage shows. Read only."""
    return tiny_model(tmp_path_factory.mktemp("llama") / "model", steps=60)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Small texts and question sets. Read only."""
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))
