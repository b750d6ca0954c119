"""The process of an engine: answers the messages on its standard input until that ends.

A message names an action of the engine and its arguments; the answer has what it returns, or `error`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import IO, Any, Protocol

from tasks.engines.wire import Array, RefusalError, WireError, receive, send


class Engine(Protocol):
    """What each module here has as `Engine`. actions: the names of the methods that may be asked for; each takes the
    message's values by name, and its array, if there is one, as `array`; it returns values, or an array."""

    actions: frozenset[str]


def work(engine: Engine, asked: IO[bytes], answers: IO[bytes]) -> None:
    """Answer each message until there are no more."""
    while True:
        try:
            values, array = receive(asked)
        except WireError:
            return  # the other side has ended
        try:
            found = _answer(engine, values, array)
        except Exception as error:  # whatever it is, the other side must hear of it
            refused = isinstance(error, RefusalError)
            found = {"error": str(error) if refused else f"{type(error).__name__}: {error}"}
        if isinstance(found, dict):
            send(answers, found)
        else:
            send(answers, {}, found)


def _answer(engine: Engine, values: dict[str, Any], array: Array | None) -> dict[str, Any] | Array:
    action = values.pop("do")
    if action == "memory":  # kilobytes, but bytes on macOS
        return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if action not in engine.actions:
        raise RefusalError(f"no action {action!r}; there are: {', '.join(sorted(engine.actions))}")
    given = values if array is None else {**values, "array": array}
    found: dict[str, Any] | Array = getattr(engine, action)(**given)
    return found


def run(engine: Engine) -> None:
    """Be the process of an engine."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the other side decides when this one ends
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the messages
    work(engine, sys.stdin.buffer, answers)
