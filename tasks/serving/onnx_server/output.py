"""The text of one sequence as its tokens arrive, up to a stop string."""

from __future__ import annotations

from dataclasses import dataclass, field

from .sampling import Scored
from .sequence import PromptScored, Sequence, Written
from .vocabulary import TextStream, Vocabulary


@dataclass(frozen=True)
class Piece:
    """New text with the tokens since the last piece. finish: why the text ends here, or None. stop: the stop string or
    token id that ended it, if it is not the model's own end token."""

    text: str
    tokens: tuple[Scored | int, ...]
    finish: str | None = None
    stop: str | int | None = None


@dataclass
class Output:
    """Collects one sequence. prompt: its scores, once they have arrived."""

    sequence: Sequence
    vocabulary: Vocabulary
    stops: list[str]
    keep_stop: bool
    skip_special: bool
    own_ends: frozenset[int]
    prompt: tuple[Scored | None, ...] = ()
    count: int = 0
    ended: bool = False
    _held: str = ""
    _tokens: list[Scored | int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stream = TextStream(self.vocabulary, self.sequence.prompt, self.skip_special)

    def add(self, event: PromptScored | Written) -> Piece | None:
        """The piece that this event completes; None if its text may still become a stop string or is incomplete."""
        if isinstance(event, PromptScored):
            self.prompt = event.tokens
            return None
        self.count += 1
        self._tokens.append(event.token)
        # the token that ends the text is not part of it
        if event.last != "stop":
            self._held += self._stream.add(event.id)
        if event.last is not None:
            self._held += self._stream.rest()
        if self.count > self.sequence.least and (found := self._find()):
            place, stop = found
            return self._take(place + len(stop) * self.keep_stop, "stop", stop)
        if event.last is not None:
            ended_by = event.id if event.last == "stop" and event.id not in self.own_ends else None
            return self._take(len(self._held), event.last, ended_by)
        ready = len(self._held) - self._open()
        return self._take(ready) if ready else None

    def end(self) -> Piece:
        """The only piece if no token was asked for."""
        return self._take(0, "length")

    def _find(self) -> tuple[int, str] | None:
        found = [(self._held.find(stop), stop) for stop in self.stops if stop in self._held]
        return min(found, key=lambda one: (one[0] + len(one[1]), one[0])) if found else None

    def _open(self) -> int:
        """How many last characters may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.stops), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stops):
                return length
        return 0

    def _take(self, length: int, finish: str | None = None, stop: str | int | None = None) -> Piece:
        piece = Piece(self._held[:length], tuple(self._tokens), finish, stop)
        self._held, self._tokens = self._held[length:], []
        self.ended = finish is not None
        return piece
