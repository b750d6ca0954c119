"""Capture llama.cpp's log."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp

_ERROR, _SAME = 4, 5  # log levels: error, continuation of the previous line


class _Log:
    """llama.cpp's messages, kept for error reports."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._last = 0
        self.callback = llama_cpp.llama_log_callback(self._on_message)  # keep alive while llama.cpp may call it

    def _on_message(self, level: int, text: bytes, _: Any) -> None:
        self._last = self._last if level == _SAME else level
        if self._last == _ERROR:
            self.errors.append(text.decode(errors="replace").strip())

    def listen(self) -> None:
        self.errors.clear()
        llama_cpp.llama_log_set(self.callback, ctypes.c_void_p(0))

    def said(self) -> str:
        return "; ".join(error for error in self.errors if error) or "no message"


LOG = _Log()
