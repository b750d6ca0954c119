"""The engine in a process of its own, seen from the server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .errors import StartError
from .messages import line, pack_sequence, unpack_event
from .sequence import Sequence, Written

_GRACE = 5.0  # seconds to end


class EngineError(Exception):
    """The engine's process has ended."""


class EngineProcess:
    """A loaded model. `run` is called from one thread. StartError if ONNX Runtime cannot load it."""

    def __init__(self, folder: Path, padding: int, vocabulary: int, threads: int) -> None:
        self.padding = padding
        self._number = 0
        arguments = [str(folder), str(padding), str(vocabulary), str(threads)]
        command = [sys.executable, "-m", f"{__package__}.worker", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            first = self._receive()
        except EngineError as error:
            raise StartError(str(error)) from error
        if first["kind"] == "refused":
            raise StartError(first["message"])
        self.version = str(first["version"])

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ended(self) -> str:
        """How the process ended, in words."""
        status = self._process.wait(_GRACE)
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        advice = "; it may have run out of memory: lower --max-batch or --kv-cache-gib" if status == -9 else ""
        return f"the process that computes has ended {how}{advice}"

    def run(self, sequences: list[Sequence]) -> None:
        """Generate until each sequence has ended or is cancelled, and send their events. EngineError if the process
        ends."""
        self._number += 1
        told: set[int] = set()
        self._tell({"run": [pack_sequence(one) for one in sequences], "number": self._number})
        while (values := self._receive())["kind"] != "done":
            gone = {row for row, one in enumerate(sequences) if one.cancelled} - told
            if gone:
                told |= gone
                self._tell({"cancel": sorted(gone), "number": self._number})
            if values["kind"] == "tick":
                continue
            one, event = sequences[values["row"]], unpack_event(values)
            if values["kind"] in ("failed", "ended") or (isinstance(event, Written) and event.last):
                one.finish(event)
            elif one.going:
                one.send(event)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, values: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line(values))
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise EngineError(self.ended()) from error

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            raise EngineError(self.ended())
        values: dict[str, Any] = json.loads(text)
        return values
