"""The process of an engine, in an environment of its own."""

from __future__ import annotations

import signal
import subprocess
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from tasks.engines.wire import Array, WireError, receive, send
from tasks.environments import clean, interpreter
from tasks.errors import TaskError
from tasks.interpreter import Interpreter
from tasks.output import CODE

PATH = str(CODE.parent)  # where an engine's program is found
_GRACE = 10.0  # seconds to end


class EngineProcess:
    """The process of an engine (tasks/engines). It ends with this object, and with our process.

    TaskError if the environment cannot be made.
    """

    def __init__(self, program: Interpreter) -> None:
        self._name = program.entry.rpartition(".")[2]
        command = [str(interpreter(Path(program.lock).stem)), "-P", "-m", program.entry]
        environment = clean() | {"PYTHONPATH": PATH}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._end = weakref.finalize(self, _end, self._process)

    def ask(self, action: str, array: Array | None = None, **values: Any) -> tuple[dict[str, Any], Array | None]:
        """The answer of an action. TaskError with the engine's words if it refuses, or if the process ends."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            send(self._process.stdin, {"do": action, **values}, array)
            found, rows = receive(self._process.stdout)
        except (OSError, ValueError, WireError) as error:  # ValueError: it was closed
            raise TaskError(f"the process of the engine {self._name} {self._ended()}") from error
        if "error" in found:
            raise TaskError(found["error"])
        return found, rows

    def close(self) -> None:
        """End the process."""
        self._end()

    def _ended(self) -> str:
        self._end()
        status = self._process.returncode
        if status >= 0:
            return f"ended with status {status}; its last words are above"
        advice = "; it may have run out of memory: see the kernel's log" if status == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-status).name}{advice}"


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    assert process.stdout
    with suppress(OSError):  # it has ended, with something unsent
        process.stdin.close()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
