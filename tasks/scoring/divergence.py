"""Perplexity on held-out text, and divergence from the baseline per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.errors import TaskError
from tasks.settings import DataSource
from tasks.text.bos import begins_with_bos
from tasks.text.documents import SEPARATOR, documents

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_ROWS = 32

# a model's log-probabilities: int64 [1, tokens] -> float32 [1, tokens, vocabulary]
Predictions = Callable[["Tensor"], "Tensor"]
# the baseline's log-probabilities for a window, given its number and ids: float32 [tokens - 1, vocabulary]
Reference = Callable[[int, "Tensor"], "Tensor"]


@dataclass(frozen=True)
class TextScore:
    """Scores over all scored tokens of a text.

    perplexity: per token; word_perplexity: per word; kl: mean Kullback-Leibler divergence from the baseline, in nats
    per token; top1: share of positions where both models rank the same token first; tokens: number of scored tokens.
    """

    perplexity: float
    word_perplexity: float
    kl: float
    top1: float
    tokens: int


@dataclass(frozen=True)
class Window:
    """The token ids of one forward pass, and the number of words in their text."""

    ids: Sequence[int]
    words: int


def text_windows(
    tokenizer: PreTrainedTokenizerBase, raw: Path, name: str, source: DataSource, tokens: int, window: int
) -> list[Window]:
    """Split the first `tokens` tokens of the data set `name` into windows of `window` tokens.

    Each window begins with BOS if the tokenizer adds it. Records whose field is not a text are left out and counted in
    a printed line. Raises TaskError if the text is too short.
    """
    prefix = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    size = window - len(prefix)
    count = math.ceil(tokens / window)
    stream: list[int] = []
    others = 0
    for text in documents(raw, name, source):
        if not isinstance(text, str):
            others += 1
            continue
        stream += tokenizer(text.strip() + SEPARATOR, add_special_tokens=False).input_ids
        if len(stream) >= count * size:
            break
    else:
        left_out = f" ({others} records left out: not a text)" if others else ""
        raise TaskError(
            f"the text {name} has {len(stream)} tokens{left_out}, but evaluation.text_tokens is {tokens}; "
            "lower it or choose a longer text"
        )
    if others:
        print(f"{name}: {others} records left out: not a text")
    pieces = [stream[i * size : (i + 1) * size] for i in range(count)]
    return [Window([*prefix, *piece], len(str(tokenizer.decode(piece)).split())) for piece in pieces]


def measure_text(
    ours: Predictions, reference: Reference | None, windows: Sequence[Window], name: str
) -> tuple[list[dict[str, Any]], TextScore]:
    """Measure a text: sums per window, and scores for the whole text. reference: None if the model is the baseline."""
    rows = []
    for number, window in enumerate(tqdm(windows, desc=f"windows of {name}")):
        rows.append({"window": number, "words": window.words, **_measure(ours, reference, number, window)})
    tokens, word_count = (sum(row[key] for row in rows) for key in ("tokens", "words"))
    nll = sum(row["nll"] for row in rows)
    return rows, TextScore(
        perplexity=math.exp(nll / tokens),
        word_perplexity=math.exp(min(nll / max(word_count, 1), 700.0)),
        kl=sum(row["kl"] for row in rows) / tokens,
        top1=sum(row["agree"] for row in rows) / tokens,
        tokens=tokens,
    )


def _measure(ours_of: Predictions, reference: Reference | None, number: int, window: Window) -> dict[str, Any]:
    """Sums of nll (nats), kl (nats) and agreements over a window's tokens after the first."""
    import torch

    ids = torch.tensor([window.ids])
    with torch.inference_mode():
        ours = ours_of(ids)[0, :-1]
        targets = ids[0, 1:].to(ours.device)
        nll = -ours.gather(1, targets[:, None]).double().sum().item()
        tokens = len(targets)
        if reference is None:
            return {"tokens": tokens, "nll": nll, "kl": 0.0, "agree": tokens}
        theirs = reference(number, ids)
        # a few rows at a time, to fit the processor's cache: a row has one number per token of the vocabulary
        kl = sum(_divergence(a, b) for a, b in zip(theirs.split(_ROWS), ours.split(_ROWS), strict=True))
        agree = int((theirs.argmax(-1) == ours.argmax(-1)).sum())
    return {"tokens": tokens, "nll": nll, "kl": kl, "agree": agree}


def _divergence(reference: Tensor, other: Tensor) -> float:
    """Kullback-Leibler divergence of `other` from `reference`, log-probabilities [rows, vocabulary]: sum over rows."""
    # rounding can make the divergence of equal distributions slightly negative
    return (reference.exp() * (reference - other)).double().sum(-1).clamp(min=0).sum().item()
