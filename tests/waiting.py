"""Waiting for what must come, in tests and drills."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

halted = threading.Event()  # set where nobody is to wait any longer, in no thread


class Halted(Exception):  # noqa: N818 - a request, not an error
    """The waiting was ended from elsewhere."""


def soon(condition: Callable[[], T], seconds: float, tick: float = 0.1) -> T:
    """What the condition says as soon as that is true, or at the latest when the time is up; a look every `tick`."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        if halted.wait(tick):
            raise Halted
    return found
