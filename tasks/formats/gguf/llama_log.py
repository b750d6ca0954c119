"""What llama.cpp says, caught."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp

_ERROR, _SAME = 4, 5  # levels of its log: an error, and the rest of the line before


class _Log:
    """What llama.cpp says: kept, so that an error can be told in its own words."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._last = 0
        self.callback = llama_cpp.llama_log_callback(self._hear)  # must live as long as llama.cpp may call it

    def _hear(self, level: int, text: bytes, _: Any) -> None:
        self._last = self._last if level == _SAME else level
        if self._last == _ERROR:
            self.errors.append(text.decode(errors="replace").strip())

    def listen(self) -> None:
        self.errors.clear()
        llama_cpp.llama_log_set(self.callback, ctypes.c_void_p(0))

    def said(self) -> str:
        return "; ".join(error for error in self.errors if error) or "it said nothing"


LOG = _Log()
