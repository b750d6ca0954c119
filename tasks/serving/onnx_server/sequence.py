"""One text to generate, and what the engine reports of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy

from .sampling import Sampling, Scored


@dataclass(frozen=True)
class PromptScored:
    """Log-probabilities of the prompt's tokens; None for the first."""

    tokens: tuple[Scored | None, ...]


@dataclass(frozen=True)
class Written:
    """One generated token: its id, or, where log-probabilities are wanted, its score. last: why it is the last one, or
    None."""

    token: Scored | int
    last: Literal["stop", "length"] | None

    @property
    def id(self) -> int:
        """The token's id."""
        return self.token if isinstance(self.token, int) else self.token.id


@dataclass(frozen=True)
class Ended:
    """No token was asked for, so only the prompt was read."""


@dataclass(frozen=True)
class Failed:
    """The text cannot be generated. status: for HTTP."""

    status: int
    message: str


Event = PromptScored | Written | Ended | Failed


@dataclass(eq=False)
class Sequence:
    """A prompt and what to generate after it.

    most, least: tokens. seed: of the random choices; None: another one each time. ends: ids that end the text.
    logprobs, prompt_logprobs: how many of the best tokens to report at each place of text and prompt; None: no
    log-probabilities. send: called by the engine's thread for each event. cancelled: set by the receiver, which then
    gets no more events.
    """

    prompt: tuple[int, ...]
    most: int
    sampling: Sampling
    seed: int | None
    send: Callable[[Event], None]
    ends: frozenset[int] = frozenset()
    least: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    written: list[int] = field(default_factory=list)
    cancelled: bool = False
    done: bool = False

    def __post_init__(self) -> None:
        self.random = numpy.random.default_rng(self.seed)

    @property
    def going(self) -> bool:
        """Whether tokens are still to be generated."""
        return not (self.done or self.cancelled)

    @property
    def longest(self) -> int:
        """Tokens of prompt and text at most."""
        return len(self.prompt) + self.most

    def finish(self, event: Event) -> None:
        """Send the last event."""
        if self.going:
            self.done = True
            self.send(event)
