"""The answers' JSON, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from .logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from .output import Output, Piece
from .sampling import Scored
from .schemas import Chat, Completion
from .served import Served


def _ids(piece: Piece) -> list[int]:
    return [token if isinstance(token, int) else token.id for token in piece.tokens]


def _scores(piece: Piece) -> list[Scored]:
    return [token for token in piece.tokens if isinstance(token, Scored)]


@dataclass
class _Answer:
    served: Served
    outputs: list[Output]
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self, prompts: int) -> dict[str, Any]:
        """Tokens of the request. prompts: of all prompts, each once."""
        written = sum(output.count for output in self.outputs)
        return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}


@dataclass
class CompletionAnswer(_Answer):
    """The answer to /v1/completions."""

    request: Completion = field(kw_only=True)
    kind = "text_completion"

    def __post_init__(self) -> None:
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": self.kind, "created": self.created}
        self._offsets = [0] * len(self.outputs)
        self._begun: set[int] = set()

    def whole(self, pieces: list[Piece], prompts: int) -> dict[str, Any]:
        """The answer that is not streamed; one piece with everything for each text."""
        choices = [self._choice(index, piece) for index, piece in enumerate(pieces)]
        for choice, output in zip(choices, self.outputs, strict=True):
            wanted = self.request.prompt_logprobs
            scored = None if wanted is None else prompt_logprobs(output.prompt, wanted, self.served.vocabulary)
            choice["prompt_logprobs"] = scored
        return {**self._head, "model": self.served.name, "choices": choices, "usage": self.usage(prompts)}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """One chunk of a stream."""
        return {**self._head, "model": self.served.name, "choices": [self._choice(index, piece)]}

    def last(self, prompts: int) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._head, "model": self.served.name, "choices": [], "usage": self.usage(prompts)}

    def first(self, index: int) -> list[dict[str, Any]]:
        """Chunks before the text: none."""
        return []

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        request, output, vocabulary = self.request, self.outputs[index], self.served.vocabulary
        prompt = output.sequence.prompt
        begins = index not in self._begun
        self._begun.add(index)
        echo = request.echo and begins
        scores: list[Scored | None] = [*(output.prompt if echo else ()), *_scores(piece)]
        logprobs = None
        if request.logprobs is not None:
            as_id, best = request.return_tokens_as_token_ids, request.logprobs
            logprobs = completion_logprobs(scores, prompt[:1], best, self._offsets[index], vocabulary, as_id)
            self._offsets[index] += sum(map(len, logprobs["tokens"]))
        choice = {
            "index": index,
            "text": (vocabulary.decode(prompt, request.skip_special_tokens) if echo else "") + piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop,
        }
        if request.return_token_ids:
            choice |= {"token_ids": _ids(piece), "prompt_token_ids": list(prompt) if begins else None}
        return choice


@dataclass
class ChatAnswer(_Answer):
    """The answer to /v1/chat/completions."""

    request: Chat = field(kw_only=True)

    def __post_init__(self) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": self.created, "model": self.served.name}
        self._prompt = list(self.outputs[0].sequence.prompt)

    def whole(self, pieces: list[Piece], prompts: int) -> dict[str, Any]:
        """The answer that is not streamed; one piece with everything for each text."""
        choices = []
        for index, piece in enumerate(pieces):
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            choices.append({"index": index, "message": message, **self._common(piece)})
        answer = {**self._head, "object": "chat.completion", "choices": choices, "usage": self.usage(prompts)}
        wanted, scored = self.request.prompt_logprobs, self.outputs[0].prompt
        if wanted is not None:
            answer["prompt_logprobs"] = prompt_logprobs(scored, wanted, self.served.vocabulary)
        if self.request.return_token_ids:
            answer["prompt_token_ids"] = self._prompt
        return answer

    def first(self, index: int) -> list[dict[str, Any]]:
        """Chunks before the text: the role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        further = {"prompt_token_ids": self._prompt} if self.request.return_token_ids else {}
        return [{**self._chunk([choice]), **further}]

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """One chunk of a stream."""
        delta = {"content": piece.text} if piece.text or piece.finish is None else {}
        return self._chunk([{"index": index, "delta": delta, **self._common(piece)}])

    def last(self, prompts: int) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._chunk([]), "usage": self.usage(prompts)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _common(self, piece: Piece) -> dict[str, Any]:
        request, logprobs = self.request, None
        if request.logprobs:
            best, as_id = request.top_logprobs or 0, request.return_tokens_as_token_ids
            logprobs = chat_logprobs(_scores(piece), best, self.served.vocabulary, as_id)
        found = {"logprobs": logprobs, "finish_reason": piece.finish, "stop_reason": piece.stop}
        return {**found, "token_ids": _ids(piece)} if request.return_token_ids else found
