r"""A program's output as log lines: a progress bar becomes one line every few seconds.

A progress bar writes `\r` and text without a newline. Read line by line, it would print nothing for minutes.
"""

from __future__ import annotations

import codecs
import re
import time
from collections.abc import Callable, Iterable, Iterator

EVERY = 3.0  # seconds between two lines of one bar

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# tqdm: `name:  42%|####      | 84/200 [00:21<00:29,  3.95it/s]`
_BAR = re.compile(
    r"^(?:(?P<name>.*?):\s*)?\s*\d+%\|.*\|\s*(?P<n>[\d.]+\w?)/(?P<total>[\d.]+\w?)"
    r"\s*\[(?P<spent>[\d:]+)<(?P<left>[\d:?]+)"
)
# with an unknown total: `name: 1.2MB [00:01, 4.0MB/s]`
_COUNT = re.compile(r"^(?P<name>\S.*?):\s*(?P<n>[\d.]+\w*)\s*\[(?P<spent>[\d:]+), .*/s\]$")


class Lines:
    """Turns chunks of output into log lines.

    A complete line is passed on at once. A bar is passed on after a second, then every `every` seconds, and at its end
    if it was shown before. Bars whose names differ only in digits count as one.
    """

    def __init__(self, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rest = ""
        self.share: float | None = None  # finished share according to the last bar passed on, 0 to 1
        self._due: dict[str, float] = {}
        self._shown: dict[str, str] = {}

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Yield the lines for `chunk`; an empty chunk means that the program printed nothing."""
        self._rest += self._decoder.decode(chunk)
        *done, self._rest = self._rest.split("\n")
        for line in done:
            yield from self._line(line)
        # only the newest state of a bar matters
        _, mark, newest = self._rest.rpartition("\r")
        if mark and newest.strip():
            yield from self._redrawn([newest])
            self._rest = "\r" + newest

    def close(self) -> Iterator[str]:
        """Yield the remaining output when the program has ended."""
        rest, self._rest = self._rest, ""
        yield from self._line(rest)

    def _line(self, line: str) -> Iterator[str]:
        *redrawn, last = line.rstrip("\r").split("\r")
        yield from self._redrawn(redrawn)
        text = _ESCAPE.sub("", last).rstrip()
        if _BAR.match(text) or _COUNT.match(text):
            yield from self._redrawn([text])
        elif text:
            self.share = None
            yield text

    def _redrawn(self, states: Iterable[str]) -> Iterator[str]:
        for state in states:
            text = _ESCAPE.sub("", state).strip()
            if text:
                yield from self._bar(text)

    def _bar(self, text: str) -> Iterator[str]:
        bar = _BAR.match(text) or _COUNT.match(text)
        name = (bar["name"] or "").strip() if bar else text
        key = re.sub(r"\d+", "#", name)
        now = self._clock()
        due = self._due.setdefault(key, now + 1)
        line = _readable(name, bar) if bar else text
        ended = bar is not None and bar["n"] == bar.groupdict().get("total") and self._shown.get(key) == name
        if now >= due or ended:
            self._due[key] = now + self._every
            # a finished bar is not shown again, even if redrawn
            self._shown[key] = "" if ended else name
            self.share = _share(name, bar) if bar else None
            yield line


def _share(name: str, bar: re.Match[str]) -> float | None:
    """The finished share; for one of several bars, as in `(2/31): Calibrating`, the share over all of them."""
    total = bar.groupdict().get("total")
    if total is None or bar["n"][-1:].isalpha() or total[-1:].isalpha() or not float(total):
        return None
    done = float(bar["n"]) / float(total)
    if several := re.match(r"\((\d+)/(\d+)\)", name):
        done = (int(several[1]) - 1 + done) / int(several[2])
    return min(done, 1.0)


def _readable(name: str, bar: re.Match[str]) -> str:
    what = f"{name}: " if name else ""
    if "total" not in bar.groupdict():
        return f"{what}{bar['n']}, {bar['spent']} spent"
    left = "" if "?" in bar["left"] or bar["n"] == bar["total"] else f", {bar['left']} left"
    return f"{what}{bar['n']} of {bar['total']}, {bar['spent']} spent{left}"
