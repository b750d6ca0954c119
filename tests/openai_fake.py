"""A small OpenAI-compatible server with an invented model, which can be told to misbehave.

python -m tests.openai_fake --host 127.0.0.1 --port 8000 --name m --context 256 --fault "ignores stop"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from tests.tiny import tiny_tokenizer

LOGPROBS = tuple(math.log(share) for share in (0.5, 0.25, 0.1, 0.05, 0.02))
TIE = tuple(math.log(share) for share in (0.3, 0.2999, 0.1, 0.05, 0.02))
RARE = math.log(1e-4)
FIRST = 262  # of the tokens that the model writes: those before are single bytes
STEP = 0.004  # seconds for a token
LINGER = 15.0  # seconds that a request is in work whose client has left, with the fault "writes on"
Ids = Sequence[int]


class Model:
    """An invented language model: the last three tokens determine the next one's probabilities."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()

    def best(self, ids: Ids) -> list[tuple[int, float]]:
        """The five most likely next tokens with their log-probabilities; every eighth place is a near-tie."""
        numbers = random.Random(str(tuple(ids[-3:])))
        tokens = numbers.sample(range(FIRST, len(self.tokenizer)), 5)
        return list(zip(tokens, TIE if numbers.random() < 1 / 8 else LOGPROBS, strict=True))

    def logprob(self, ids: Ids, token: int) -> float:
        """The log-probability of a token after others."""
        return dict(self.best(ids)).get(token, RARE)

    def write(self, ids: Ids, tokens: int, flip: bool = False) -> list[int]:
        """A greedy continuation. flip: take the second token in a near-tie."""
        found: list[int] = []
        for _ in range(tokens):
            best = self.best([*ids, *found])
            found.append(best[int(flip and best[0][1] == TIE[0])][0])
        return found


class Server:
    """The addresses, the model and the faults: what the server does wrong."""

    def __init__(self, name: str, context: int, faults: Sequence[str] = ()) -> None:
        self.name, self.context, self.faults = name, context, set(faults)
        self.model = Model()
        self.running = 0
        self.app = FastAPI()
        self.app.get("/health")(lambda: Response())
        self.app.get("/v1/models")(self.models)
        self.app.get("/metrics")(self.metrics)
        self.app.post("/v1/completions")(self.completions)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.post("/tokenize")(self.tokenize)

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        name = "another" if "another name" in self.faults else self.name
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "fake"}]}

    def metrics(self) -> PlainTextResponse:
        """GET /metrics."""
        return PlainTextResponse(f'# TYPE fake:running gauge\nfake:running{{model="m"}} {self.running}\n')

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """POST /tokenize."""
        return {"tokens": self.conversation((await request.json())["messages"])}

    def conversation(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of a conversation."""
        if "another template" in self.faults:
            messages = [{**one, "content": one["content"].strip()} for one in messages]
        text = self.model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.model.tokenizer(str(text), add_special_tokens=False).input_ids)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await request.json()
        given = body["prompt"]
        several = isinstance(given, list) and not isinstance(given[0], int)
        prompts = [self.read(one) for one in (given if several else [given])]
        if refused := self.refused(prompts, body):
            return refused
        if body.get("stream"):
            return StreamingResponse(self.streamed(prompts[0], body, chat=False), media_type="text/event-stream")
        with self.counted():
            flip = self.running > 1 and "near-ties flip" in self.faults
            choices = [self.choice(prompt, body, flip) for prompt in prompts]
            await asyncio.sleep(STEP * body["max_tokens"])
            if self.running > 1 and "mixes requests" in self.faults:
                choices = [self.choice([*prompt, FIRST], body) for prompt in prompts]
        if "mixes a batch" in self.faults:
            choices.reverse()
        if "miscounts" in self.faults:
            choices = [{**choice, "token_ids": choice["token_ids"][:-1]} for choice in choices]
        return JSONResponse(
            {
                "id": "1",
                "object": "text_completion",
                "created": 0,
                "model": self.name,
                "choices": [{**choice, "index": n} for n, choice in enumerate(choices)],
                "usage": self.usage(prompts, choices),
            }
        )

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await request.json()
        if body.get("tools") and "refuses tools" in self.faults:
            return error(400, "tools need --enable-auto-tool-choice")
        prompt = self.conversation(body["messages"])
        if body.get("stream"):
            return StreamingResponse(self.streamed(prompt, body, chat=True), media_type="text/event-stream")
        with self.counted():
            choice = self.choice(prompt, {**body, "logprobs": body.get("top_logprobs")})
            await asyncio.sleep(STEP * body["max_tokens"])
        listed = choice.pop("logprobs")
        content = listed and [
            {
                "token": t,
                "logprob": v,
                "bytes": None,
                "top_logprobs": [{"token": k, "logprob": w} for k, w in b.items()],
            }
            for t, v, b in zip(listed["tokens"], listed["token_logprobs"], listed["top_logprobs"], strict=True)
        ]
        text = "" if "silent chat" in self.faults else choice.pop("text")
        found = {
            **choice,
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": {"content": content},
        }
        if "silent chat" in self.faults:
            found |= {"token_ids": [], "finish_reason": "length"}
        usage = self.usage([prompt], [found])
        return JSONResponse(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": self.name,
                "choices": [found],
                "usage": usage,
                "prompt_token_ids": prompt,
            }
        )

    def read(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a prompt."""
        return self.model.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt

    def refused(self, prompts: Sequence[Ids], body: dict[str, Any]) -> Response | None:
        """The answer to requests that are too long; None for others."""
        if max(map(len, prompts)) + body["max_tokens"] <= self.context or "takes any length" in self.faults:
            return None
        if "breaks on length" in self.faults:
            return error(500, "internal error")
        return error(400, "too long" if "names no limit" in self.faults else f"more than {self.context} tokens")

    def choice(self, prompt: Ids, body: dict[str, Any], flip: bool = False) -> dict[str, Any]:
        """A choice, of completions."""
        ids = self.model.write(prompt, body["max_tokens"], flip)
        if "other tokens" in self.faults:
            ids = ids[:3] + self.model.write([*prompt, *ids[:3], FIRST], len(ids) - 3)
        ids, text, finish, stop = self.ended(ids, body)
        shown = [*prompt, *ids] if body.get("echo") else ids
        return {
            "text": text,
            "finish_reason": finish,
            "stop_reason": stop,
            "token_ids": ids,
            "prompt_token_ids": list(prompt),
            "logprobs": None if body.get("logprobs") is None else self.logprobs(prompt, shown, bool(body.get("echo"))),
        }

    def ended(self, ids: list[int], body: dict[str, Any]) -> tuple[list[int], str, str, Any]:
        """Tokens, text, reason and place of the end."""
        stops = body.get("stop") or []
        for place, token in enumerate(ids):
            text = self.text(ids[: place + 1])
            for stop in [stops] if isinstance(stops, str) else stops:
                if stop in text and "ignores stop" not in self.faults:
                    return ids[: place + 1], text[: text.index(stop)], "stop", stop
            if token in (body.get("stop_token_ids") or []) and "ignores stop tokens" not in self.faults:
                return ids[: place + 1], self.text(ids[:place]), "stop", token
        return ids, self.text(ids), "length", None

    def text(self, ids: Ids) -> str:
        """The text of token ids."""
        return str(self.model.tokenizer.decode(list(ids)))

    def logprobs(self, prompt: Ids, shown: Ids, echo: bool) -> dict[str, Any]:
        """Log-probabilities of completions."""
        before = [] if echo else list(prompt)
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for place, token in enumerate(shown):
            ids = [*before, *shown[:place]]
            best = self.model.best(ids)
            values.append(self.model.logprob(ids, token) + 0.01 * ("shifted" in self.faults) if ids else None)
            tops.append({f"token_id:{one}": value for one, value in best} if ids else None)
        if "log-probabilities of another token" in self.faults:
            values = [value and value - 3 for value in values]
        if "no log-probability for the last" in self.faults:
            values = values[:-1]
        names = [f"token_id:{token}" for token in shown]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": []}

    def usage(self, prompts: Sequence[Ids], choices: Sequence[dict[str, Any]]) -> dict[str, int]:
        """The counts of tokens."""
        read, written = sum(map(len, prompts)), sum(len(choice["token_ids"]) for choice in choices)
        written += len(choices) * ("miscounts" in self.faults)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def streamed(self, prompt: Ids, body: dict[str, Any], *, chat: bool) -> AsyncIterator[str]:
        """The pieces of an answer."""
        self.running += 1
        try:
            choice = self.choice(prompt, {**body, "logprobs": None})
            ids = choice["token_ids"][: -1 if "drops the tail of a stream" in self.faults else None]
            for place, token in enumerate(ids):
                text = self.text(ids[: place + 1]).removeprefix(self.text(ids[:place]))
                last = choice["finish_reason"] if place == len(ids) - 1 else None
                piece = {"delta": {"content": text}} if chat else {"text": text, "logprobs": None}
                found = {"index": 0, "finish_reason": last, "token_ids": [token], **piece}
                kind = "chat.completion.chunk" if chat else "text_completion"
                line = {"id": "1", "object": kind, "created": 0, "model": self.name, "choices": [found]}
                yield f"data: {json.dumps(line)}\n\n"
                await asyncio.sleep(STEP)
            yield "data: [DONE]\n\n"
        finally:
            if "writes on" in self.faults:
                asyncio.get_running_loop().call_later(LINGER, self.ends)
            else:
                self.ends()

    def ends(self) -> None:
        """A request has ended."""
        self.running -= 1

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request while it is in work."""
        self.running += 1
        try:
            yield
        finally:
            self.ends()


def error(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse({"error": {"message": message, "type": "error", "code": status}}, status_code=status)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--fault", action="append", default=[])
    arguments = parser.parse_args()
    if "does not start" in arguments.fault:
        print("(EngineCore pid=7) ERROR 11-29 10:00:00 [core.py:1] ValueError: no kernel for /a/folder/of/mine/model")
        sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
    server = Server(arguments.name, arguments.context, arguments.fault)
    uvicorn.run(server.app, host=arguments.host, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
