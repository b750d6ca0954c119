"""Log-probabilities in the forms of OpenAI and vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .sampling import Scored
from .vocabulary import Vocabulary


def _text(vocabulary: Vocabulary, number: int, as_id: bool) -> str:
    return f"token_id:{number}" if as_id else vocabulary.token(number)


def _pairs(token: Scored, best: int) -> list[tuple[int, float]]:
    """The `best` most likely tokens, and the chosen one if it is not among them."""
    pairs = list(token.best[:best])
    return pairs if any(number == token.id for number, _ in pairs) else [*pairs, (token.id, token.logprob)]


def completion_logprobs(
    tokens: Iterable[Scored | None], first: tuple[int, ...], best: int, offset: int, vocabulary: Vocabulary, as_id: bool
) -> dict[str, Any]:
    """OpenAI's form for completions. first: ids of the tokens without a score, in order. offset: characters before."""
    found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    missing = iter(first)
    for token in tokens:
        text = _text(vocabulary, next(missing) if token is None else token.id, as_id)
        found["text_offset"].append(offset)
        found["tokens"].append(text)
        found["token_logprobs"].append(None if token is None else token.logprob)
        top: dict[str, float] | None = None
        if token is not None:
            top = {}
            for number, logprob in _pairs(token, best):
                top.setdefault(_text(vocabulary, number, as_id), logprob)  # the likeliest of tokens with equal text
        found["top_logprobs"].append(top)
        offset += len(text)
    return found


def chat_logprobs(tokens: Iterable[Scored], best: int, vocabulary: Vocabulary, as_id: bool) -> dict[str, Any]:
    """OpenAI's form for chats."""

    def one(number: int, logprob: float) -> dict[str, Any]:
        text = _text(vocabulary, number, as_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", errors="replace"))}

    content = [
        {**one(token.id, token.logprob), "top_logprobs": [one(*pair) for pair in token.best[:best]]} for token in tokens
    ]
    return {"content": content}


def prompt_logprobs(tokens: Iterable[Scored | None], best: int, vocabulary: Vocabulary) -> list[dict[str, Any] | None]:
    """vLLM's form: for each token but the first, by token id."""
    return [None if token is None else _by_id(token, best, vocabulary) for token in tokens]


def _by_id(token: Scored, best: int, vocabulary: Vocabulary) -> dict[str, Any]:
    ranks = {number: place for place, (number, _) in enumerate(token.best, start=1)} | {token.id: token.rank}
    return {
        str(number): {"logprob": logprob, "rank": ranks[number], "decoded_token": vocabulary.token(number)}
        for number, logprob in _pairs(token, best)
    }
