"""A server over HTTP: the official OpenAI client for models, completions and chat, httpx for all else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
from openai import DefaultHttpxClient, OpenAI, OpenAIError, Stream
from openai.types import Completion
from openai.types.chat import ChatCompletion

LIMIT = 600.0  # seconds for an answer
BEST = 5  # most likely tokens of each place that are asked for, the most that servers allow by default
_IDS = ("return_token_ids", "return_tokens_as_token_ids")

# what a call raises for a server that fails, or answers in another form than expected
BROKEN = (OpenAIError, httpx.HTTPError, LookupError, TypeError, ValueError)
ID = "token_id:"  # before the id, where a server names tokens by their ids
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Answer:
    """A continuation.

    finish: the server's reason for its end. ids: its tokens. prompt_ids: what the model read. tokens: its tokens as the
    server writes them, `token_id:7` or their text. logprobs: natural, of each token. best: the most likely tokens of
    each place with their log-probabilities, best first. All of these are None if the server does not tell.
    prompt_count, count: of tokens, as the server counts them; 0 in a stream.
    """

    text: str
    finish: str | None
    ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    tokens: list[str] | None = None
    logprobs: list[float] | None = None
    best: list[list[tuple[str, float]]] | None = None
    prompt_count: int = 0
    count: int = 0


@dataclass(frozen=True)
class Api:
    """A server's addresses. url: without a path. model: its name there. offers: the features that may be asked for
    (tasks/serving/engines.py). running: the metric that counts requests in work."""

    url: str
    model: str
    offers: frozenset[str]
    running: str | None = None

    @cached_property
    def client(self) -> OpenAI:
        """The official client; without retries, which would hide failures, and without a proxy."""
        http = DefaultHttpxClient(trust_env=False)
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=LIMIT, http_client=http)

    @cached_property
    def http(self) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.url, trust_env=False, timeout=LIMIT)

    def models(self) -> list[str]:
        """The names of the served models."""
        return [model.id for model in self.client.models.list()]

    def complete(self, prompt: Prompt, tokens: int, **options: Any) -> Answer:
        """Continue a prompt greedily by at most `tokens`. Raises what the client raises."""
        return self.complete_all([prompt], tokens, **options)[0]

    def complete_all(self, prompts: Sequence[Prompt], tokens: int, **options: Any) -> list[Answer]:
        """Continue several prompts, all texts or all token ids, with one request; in the order of the prompts."""
        found = self.client.completions.create(**self._completion(prompts, tokens, options))
        usage = found.usage
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage and len(prompts) == 1 else (0, 0)
        return [_completed(choice, *counts) for choice in sorted(found.choices, key=lambda choice: choice.index)]

    def complete_streamed(self, prompt: Prompt, tokens: int, **options: Any) -> Answer:
        """As `complete`, in pieces that are put together."""
        with self.stream(prompt, tokens, **options) as pieces:
            choices = [choice for piece in pieces for choice in piece.choices]
        ids = [_extra(choice, "token_ids") for choice in choices]
        return Answer(
            "".join(choice.text for choice in choices),
            next((choice.finish_reason for choice in reversed(choices) if choice.finish_reason), None),
            [token for piece in ids for token in piece or ()] if any(ids) else None,
        )

    def stream(self, prompt: Prompt, tokens: int, **options: Any) -> Stream[Completion]:
        """The pieces of a continuation; to close it cancels the request."""
        pieces: Stream[Completion] = self.client.completions.create(
            **self._completion([prompt], tokens, options), stream=True
        )
        return pieces

    def chat(self, messages: Sequence[Mapping[str, Any]], tokens: int, **options: Any) -> Answer:
        """Answer a conversation greedily by at most `tokens`."""
        found: ChatCompletion = self.client.chat.completions.create(**self._chat(messages, tokens, options))
        choice = found.choices[0]
        listed = choice.logprobs and choice.logprobs.content
        text = choice.message.content or ""
        if choice.message.tool_calls:
            text += "".join(call.to_json() for call in choice.message.tool_calls)
        return Answer(
            text,
            choice.finish_reason,
            _extra(choice, "token_ids"),
            _extra(found, "prompt_token_ids") or _extra(choice, "prompt_token_ids"),
            [one.token for one in listed] if listed else None,
            [one.logprob for one in listed] if listed else None,
            [_ordered({top.token: top.logprob for top in one.top_logprobs}) for one in listed] if listed else None,
            found.usage.prompt_tokens if found.usage else 0,
            found.usage.completion_tokens if found.usage else 0,
        )

    def chat_streamed(self, messages: Sequence[Mapping[str, Any]], tokens: int, **options: Any) -> Answer:
        """As `chat`, in pieces that are put together."""
        asked = self._chat(messages, tokens, options)
        with self.client.chat.completions.create(**asked, stream=True) as pieces:
            choices = [choice for piece in pieces for choice in piece.choices]
        ids = [_extra(choice, "token_ids") for choice in choices]
        return Answer(
            "".join(choice.delta.content or "" for choice in choices),
            next((choice.finish_reason for choice in reversed(choices) if choice.finish_reason), None),
            [token for piece in ids for token in piece or ()] if any(ids) else None,
        )

    def given(self, ids: Sequence[int]) -> list[float]:
        """The log-probability of each token of a text after the first, nats. The server must offer `echo`."""
        return [value for value, _ in self.given_all([ids])[0]]

    def given_all(self, texts: Sequence[Sequence[int]]) -> list[list[tuple[float, bool]]]:
        """The log-probability of each token after the first, nats, and whether it is the most likely; of each text."""
        body = {"max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0, "extra_body": {_IDS[1]: True}}
        found = self.client.completions.create(model=self.model, prompt=[list(one) for one in texts], **body)  # type: ignore[call-overload]
        choices = sorted(found.choices, key=lambda choice: choice.index)
        return [_given(choice.logprobs, len(ids)) for choice, ids in zip(choices, texts, strict=True)]

    def tokenize(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of a conversation, as the model would read it. The server must offer `tokenize`."""
        return [int(token) for token in self.post("/tokenize", {"messages": list(messages)}).json()["tokens"]]

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """A plain request for this model; the answer may be an error."""
        return self.http.post(path, json={"model": self.model, **body})

    def in_work(self) -> float | None:
        """The number of requests in work, by the server's metrics; None if it does not tell."""
        if self.running is None:
            return None
        lines = self.http.get("/metrics").raise_for_status().text.splitlines()
        values = [line.rsplit(" ", 1)[1] for line in lines if re.match(rf"{re.escape(self.running)}[ {{]", line)]
        return sum(map(float, values)) if values else None

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        self.http.close()

    def _completion(self, prompts: Sequence[Prompt], tokens: int, options: Mapping[str, Any]) -> dict[str, Any]:
        sent = [one if isinstance(one, str) else list(one) for one in prompts]
        asked = {"logprobs": BEST} if "logprobs" in self.offers else {}
        return self._asked(tokens, {**asked, **options}) | {"prompt": sent if len(sent) > 1 else sent[0]}

    def _chat(self, messages: Sequence[Mapping[str, Any]], tokens: int, options: Mapping[str, Any]) -> dict[str, Any]:
        asked = {"logprobs": True, "top_logprobs": BEST} if "logprobs" in self.offers else {}
        return self._asked(tokens, {**asked, **options}) | {"messages": list(messages)}

    def _asked(self, tokens: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options that the official client does not know go into the body as they are."""
        body = dict.fromkeys(_IDS, True) if "token ids" in self.offers else {}
        known = {key: value for key, value in options.items() if key in _KNOWN}
        further = {**body, **{key: value for key, value in options.items() if key not in _KNOWN}}
        return {"model": self.model, "max_tokens": tokens, "temperature": 0, **known, "extra_body": further}


_KNOWN = ("logprobs", "top_logprobs", "stop", "tools", "tool_choice", "seed")


def _completed(choice: Any, prompt_count: int, count: int) -> Answer:
    found = choice.logprobs
    if found and (listed := _extra(found, "content")):  # llama.cpp lists them as for a chat, with ids
        return Answer(
            choice.text,
            choice.finish_reason,
            [one["id"] for one in listed],
            None,
            [f"{ID}{one['id']}" for one in listed],
            [float(one["logprob"]) for one in listed],
            [_ordered({f"{ID}{top['id']}": top["logprob"] for top in one["top_logprobs"]}) for one in listed],
            prompt_count,
            count,
        )
    tops = found.top_logprobs if found else None
    return Answer(
        choice.text,
        choice.finish_reason,
        _extra(choice, "token_ids"),
        _extra(choice, "prompt_token_ids"),
        found.tokens or None if found else None,
        [float(value) for value in found.token_logprobs] if found and found.token_logprobs else None,
        [_ordered(one) for one in tops] if tops else None,
        prompt_count,
        count,
    )


def _given(found: Any, count: int) -> list[tuple[float, bool]]:
    """Of the tokens of a text after the first; the server may have written on."""
    values, tops, tokens = (
        list(part or ())[1:count] for part in (found.token_logprobs, found.top_logprobs, found.tokens)
    )
    return [
        (float(value), token == max(top, key=lambda one: float(top[one])))
        for value, top, token in zip(values, tops, tokens, strict=True)
    ]


def _ordered(tops: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(tops.items(), key=lambda pair: -pair[1])


def _extra(value: Any, name: str) -> Any:
    """A field that the official client's types do not have; None if it is not there."""
    return (value.model_extra or {}).get(name)
