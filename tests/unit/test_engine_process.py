"""The process of an engine: its messages, what it refuses, and its end."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from pathlib import Path

import numpy
import psutil
import pytest

from tasks import engine_process
from tasks.engine_process import EngineProcess
from tasks.engines.wire import WireError, receive, send
from tasks.errors import TaskError
from tasks.interpreter import Interpreter

ENGINE = """
import os, signal, sys
import numpy
from tasks.engines.wire import RefusalError
from tasks.engines.worker import run

class Engine:
    actions = frozenset({"double", "refuse", "break_", "kill", "leave"})

    def double(self, array, factor=2):
        print("a library prints this")
        return array * factor

    def refuse(self):
        raise RefusalError("no such model")

    def break_(self):
        return 1 / 0

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self):
        sys.exit(3)

run(Engine())
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineProcess:
    """A process of a small engine, in our own environment."""
    (tmp_path / "toy.py").write_text(ENGINE)
    monkeypatch.setattr(engine_process, "interpreter", lambda _: sys.executable)
    paths = os.pathsep.join((str(Path.cwd()), str(tmp_path)))
    monkeypatch.setattr(engine_process, "clean", lambda: {**os.environ})
    monkeypatch.setattr(engine_process, "PATH", paths)
    return EngineProcess(Interpreter(entry="toy", lock="locks/toy.lock"))


def test_numbers_come_back_as_they_are(engine: EngineProcess) -> None:
    for array in (numpy.arange(6).reshape(2, 3), numpy.ones((3, 1000, 1000), numpy.float32)):
        _, found = engine.ask("double", array)
        assert found is not None
        assert found.dtype == array.dtype
        assert numpy.array_equal(found, array * 2)
    _, found = engine.ask("double", numpy.array([1, 2]), factor=5)
    assert found is not None
    assert found.tolist() == [5, 10]


def test_a_refusal_has_the_engines_words_and_an_error_its_kind(engine: EngineProcess) -> None:
    with pytest.raises(TaskError, match=r"^no such model$"):
        engine.ask("refuse")
    with pytest.raises(TaskError, match=r"^ZeroDivisionError: division by zero$"):
        engine.ask("break_")
    with pytest.raises(TaskError, match="no action 'work'; there are: break_, double"):
        engine.ask("work")
    assert engine.ask("memory")[0]["bytes"] > 2**20  # it goes on


def test_a_process_that_ends_is_said_with_how(engine: EngineProcess) -> None:
    with pytest.raises(TaskError, match="engine toy was ended by SIGKILL; it may have run out of memory"):
        engine.ask("kill")
    with pytest.raises(TaskError, match="was ended by SIGKILL"):
        engine.ask("double", numpy.array([1]))


def test_a_process_that_leaves_is_said_with_its_status(engine: EngineProcess) -> None:
    with pytest.raises(TaskError, match="ended with status 3"):
        engine.ask("leave")


def test_it_ends_when_it_is_closed_and_not_by_an_interrupt(engine: EngineProcess) -> None:
    process = psutil.Process(engine._process.pid)
    assert engine.ask("memory")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert engine.ask("memory")
    engine.close()
    assert not process.is_running()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "the stream ended"),
        (b'{"a": 1}', "the stream ended"),
        (b"hello\n", "is no message"),
        (b"[1]\n", "is no message"),
        (b'{"array": ["object", 2]}\n', "expected float32 or int64"),
        (b'{"array": ["int64", 2]}\n12345678', "ended within an array"),
    ],
)
def test_what_is_no_message_is_an_error(text: bytes, problem: str) -> None:
    with pytest.raises(WireError, match=problem):
        receive(io.BytesIO(text))


def test_an_empty_array_is_one() -> None:
    stream = io.BytesIO()
    send(stream, {"a": "ü"}, numpy.zeros((0, 3), numpy.float32))
    stream.seek(0)
    values, array = receive(stream)
    assert array is not None
    assert (values, array.shape) == ({"a": "ü"}, (0, 3))
