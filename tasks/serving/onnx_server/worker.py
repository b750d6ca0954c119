"""The engine's process: reads batches from its standard input and writes their events to its standard output.

ONNX Runtime GenAI holds Python's global lock while it computes, so in the server's own process not even /health would
be answered while a prompt is read.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from .engine import VERSION, Engine
from .errors import StartError
from .messages import line, pack_event, unpack_sequence
from .sequence import Event, Failed, Sequence


class _Worker:
    """Runs one batch after the other; a thread takes cancellations meanwhile."""

    def __init__(self, engine: Engine, output: BinaryIO) -> None:
        self._engine = engine
        self._output = output
        self._batches: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._number = -1
        self._sequences: list[Sequence] = []

    def work(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            asked = self._batches.get()
            batch = [unpack_sequence(values, partial(self._send, row)) for row, values in enumerate(asked["run"])]
            self._sequences, self._number = batch, asked["number"]
            try:
                self._engine.run(batch, lambda: self._write({"kind": "tick"}))
            except Exception as error:  # whatever it is, the requests must end and the process must go on
                for one in batch:
                    one.finish(Failed(500, f"ONNX Runtime failed: {error}"))
            self._write({"kind": "done"})

    def _listen(self) -> None:
        for text in sys.stdin.buffer:
            asked = json.loads(text)
            if "run" in asked:
                self._batches.put(asked)
            elif asked["number"] == self._number:
                for row in asked["cancel"]:
                    self._sequences[row].cancelled = True
        os._exit(0)  # the server has ended

    def _send(self, row: int, event: Event) -> None:
        self._write({"row": row, **pack_event(event)})

    def _write(self, values: dict[str, Any]) -> None:
        self._output.write(line(values))
        self._output.flush()


def main() -> None:
    """Load the model that the arguments name, then work until standard input ends."""
    # the server decides when to end, also if the signal went to both
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # what a library prints must not come between the messages
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    folder, padding, vocabulary, threads = sys.argv[1:]
    try:
        engine = Engine(Path(folder), int(padding), int(vocabulary), int(threads))
    except StartError as error:
        output.write(line({"kind": "refused", "message": str(error)}))
        output.flush()
        return
    output.write(line({"kind": "ready", "version": VERSION}))
    output.flush()
    _Worker(engine, output).work()


if __name__ == "__main__":
    main()
