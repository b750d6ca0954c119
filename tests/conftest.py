"""Fixtures that many tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # files run side by side: more threads would wait for each other

import pytest
import torch

if not torch.cuda.is_available():
    # as in tasks/quantizers/awq.py: it is of no use here, and complains of leaks when the process ends
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type]


from tests.tiny import Corpus, tiny_corpus, tiny_model


def pytest_addoption(parser: pytest.Parser) -> None:
    """--run-gpu: also the tests that need an NVIDIA GPU."""
    parser.addoption("--run-gpu", action="store_true", help="also run the tests that need an NVIDIA GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU, unless it is asked for."""
    if not config.getoption("--run-gpu"):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest --run-gpu"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama that was trained a little, so that damage shows. Read only."""
    return tiny_model(tmp_path_factory.mktemp("llama") / "model", steps=60)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Small texts and question sets. Read only."""
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))
