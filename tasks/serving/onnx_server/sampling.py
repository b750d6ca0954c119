"""Choose the next token from logits, and its log-probability."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray

Logits = NDArray[numpy.float32]  # [vocabulary]
GREEDY = 1e-5  # temperatures below are greedy, as in vLLM


@dataclass(frozen=True)
class Sampling:
    """How to choose. top_k: 0 for all tokens. bias: added to the logits, by token id."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether the logits are taken unchanged."""
        return not self.bias and (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1, 0, 0)


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability in nats and its rank (1: the most likely); best: other likely tokens and theirs,
    the most likely first. All of the model's own distribution, before temperature and other settings."""

    id: int
    logprob: float
    rank: int
    best: tuple[tuple[int, float], ...]


def choose(
    logits: Logits,
    sampling: Sampling,
    random: numpy.random.Generator,
    prompt: Sequence[int],
    written: Sequence[int],
    barred: Iterable[int] = (),
) -> int:
    """Choose the next token. barred: ids that must not be chosen."""
    barred = list(barred)
    if barred or not sampling.plain:
        logits = _changed(logits, sampling, prompt, written)
        logits[barred] = -numpy.inf
    if sampling.temperature < GREEDY:
        return int(logits.argmax())
    scaled = logits.astype(numpy.float64) / sampling.temperature
    kept = numpy.flatnonzero(scaled > -numpy.inf)
    if 0 < sampling.top_k < len(kept):
        kept = kept[numpy.argpartition(-scaled[kept], sampling.top_k - 1)[: sampling.top_k]]
    kept = kept[numpy.argsort(-scaled[kept], kind="stable")]
    chances = numpy.exp(scaled[kept] - scaled[kept[0]])
    chances /= chances.sum()
    if sampling.min_p > 0:
        count = int((chances >= sampling.min_p * chances[0]).sum())
        kept, chances = kept[:count], chances[:count] / chances[:count].sum()
    if sampling.top_p < 1:
        # the smallest number of tokens that reach top_p together
        count = int((numpy.cumsum(chances) < sampling.top_p).sum()) + 1
        kept, chances = kept[:count], chances[:count] / chances[:count].sum()
    place = int(numpy.searchsorted(numpy.cumsum(chances), random.random(), side="right"))
    return int(kept[min(place, len(kept) - 1)])


def score(logits: Logits, number: int, best: int) -> Scored:
    """Log-probability of one token and of the `best` most likely ones."""
    top = logits.max()
    total = float(top) + float(numpy.log(numpy.exp(logits - top, dtype=numpy.float64).sum()))
    found: tuple[tuple[int, float], ...] = ()
    if best:
        most = numpy.argpartition(-logits, best - 1)[:best] if best < len(logits) else numpy.arange(len(logits))
        order = most[numpy.lexsort((most, -logits[most]))]
        found = tuple((int(one), float(logits[one]) - total) for one in order)
    rank = int((logits > logits[number]).sum()) + 1
    return Scored(number, float(logits[number]) - total, rank, found)


def _changed(logits: Logits, sampling: Sampling, prompt: Sequence[int], written: Sequence[int]) -> Logits:
    """A copy with bias and penalties: repetition for prompt and text, presence and frequency for the text only."""
    logits = logits.copy()
    for number, value in sampling.bias.items():
        logits[number] += value
    if sampling.repetition_penalty != 1:
        seen = numpy.unique(numpy.array([*prompt, *written], dtype=numpy.int64))
        values, penalty = logits[seen], numpy.float32(sampling.repetition_penalty)
        logits[seen] = numpy.where(values > 0, values / penalty, values * penalty)
    if written and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, counts = numpy.unique(numpy.array(written, dtype=numpy.int64), return_counts=True)
        logits[seen] -= numpy.float32(sampling.presence_penalty)
        logits[seen] -= (sampling.frequency_penalty * counts).astype(numpy.float32)
    return logits
