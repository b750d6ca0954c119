"""Wait for conditions in tests and drills."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

halted = threading.Event()  # set to end all waiting, in all threads


class Halted(Exception):  # noqa: N818 - a request, not an error
    """The waiting was ended by `halted`."""


def soon(condition: Callable[[], T], seconds: float, tick: float = 0.1) -> T:
    """Poll the condition every `tick` seconds; return its value once it is true, or its last value after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        if halted.wait(tick):
            raise Halted
    return found
