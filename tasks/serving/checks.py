"""What a served model must do, one small function for each: each returns what it found, or raises Wrong.

A check that the server does not offer, or the model has no use for, says so. None depends on another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import httpx
from openai import APIStatusError

from tasks.deployment.tool_calling import Template
from tasks.errors import first_line
from tasks.scoring.completions import NEW_TOKENS
from tasks.serving.api import BROKEN, ID, Answer, Api
from tasks.serving.near_ties import parting
from tasks.text.chat import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 16
SHORT = 12  # tokens, where only the form of an answer matters
PATIENCE, HASTE = 10.0, 0.25  # seconds in which a cancelled request must have ended, at most and at least
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    _QUESTION,
    [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Say hello, naïve café 你好 🙂."}],
    [
        {"role": "user", "content": "  Count to three. "},
        {"role": "assistant", "content": "1, 2, 3"},
        {"role": "user", "content": "And\n\nbackwards?"},
    ],
)


class Wrong(Exception):  # noqa: N818 - a finding
    """What a server did, and what was expected."""


class NotOffered(Exception):  # noqa: N818
    """Why a check does not apply."""


@dataclass(frozen=True)
class Finding:
    """The result of one check. detail: what was found, and, if it failed, what was expected."""

    check: str
    state: Literal["passed", "failed", "not offered"]
    detail: str


@dataclass(frozen=True)
class Subject:
    """A served model. context: tokens that it takes. near: the bound of a near-tie, nats. date: what its chat template
    takes for today (YYYY-MM-DD)."""

    api: Api
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    template: Template
    context: int
    near: float
    date: str

    @cached_property
    def alone(self) -> list[Answer]:
        """The greedy answers after the prompts, one request at a time."""
        return [self.api.complete(prompt, NEW_TOKENS) for prompt in self.prompts[:AT_ONCE]]

    def needs(self, feature: str, title: str) -> None:
        """NotOffered if the server does not have the feature."""
        if feature not in self.api.offers:
            raise NotOffered(f"the server has no {title}")

    def needs_chat(self) -> None:
        """NotOffered if the model has no chat template."""
        if not self.template.chat:
            raise NotOffered("the model has no chat template")


def models(subject: Subject) -> str:
    """The model is listed under its name."""
    found = subject.api.models()
    if subject.api.model not in found:
        raise Wrong(f"listed: {', '.join(found) or 'none'}; expected {subject.api.model}")
    return subject.api.model


def completions(subject: Subject) -> str:
    """A prompt is continued by as many tokens as were asked for, unless the text ends."""
    answer = subject.alone[0]
    return _whole(answer, NEW_TOKENS)


def chat(subject: Subject) -> str:
    """A conversation is answered."""
    subject.needs_chat()
    return _whole(subject.api.chat(_QUESTION, SHORT), SHORT)


def streaming(subject: Subject) -> str:
    """A streamed answer is the same as one that is not, to its last piece."""
    pairs = [(subject.alone[0], subject.api.complete_streamed(subject.prompts[0], NEW_TOKENS))]
    if subject.template.chat:
        pairs.append((subject.api.chat(_QUESTION, SHORT), subject.api.chat_streamed(_QUESTION, SHORT)))
    for whole, streamed in pairs:
        _same(whole, streamed, subject.near, "streamed")
        if whole.finish != streamed.finish and whole.text == streamed.text:
            raise Wrong(f"the stream ended with the reason {streamed.finish}; expected {whole.finish}")
    return "completions and chat" if len(pairs) > 1 else "completions"


def batches(subject: Subject) -> str:
    """Several prompts in one request are answered as each alone, in their order."""
    alone = subject.alone[:4]
    together = subject.api.complete_all(subject.prompts[:4], NEW_TOKENS)
    return _all_same(alone, together, subject.near, "in one request")


def stop_strings(subject: Subject) -> str:
    """A text ends before a string that it would have contained."""
    return _stopped_by(subject, "stop", _stop_string, lambda answer, stop: stop in answer.text)


def stop_tokens(subject: Subject) -> str:
    """A text ends at a token that it would have contained."""
    subject.needs("stop tokens", "stop tokens")
    subject.needs("token ids", "token ids")
    return _stopped_by(
        subject,
        "stop_token_ids",
        lambda answer: next(
            (
                one
                for n, one in enumerate(answer.ids or ())
                if n >= NEW_TOKENS // 4 and (answer.ids or ()).index(one) == n
            ),
            None,
        ),
        lambda answer, stop: stop in (answer.ids or ())[:-1],
    )


def chat_template(subject: Subject) -> str:
    """The model reads the same tokens of a conversation as by the tokenizer's own template."""
    subject.needs_chat()
    ways: dict[str, Callable[[Sequence[Mapping[str, Any]]], list[int] | None]] = {}
    if "token ids" in subject.api.offers:
        ways["chat"] = lambda messages: subject.api.chat(messages, 1).prompt_ids
    if "tokenize" in subject.api.offers:
        ways["tokenize"] = subject.api.tokenize
    compared = 0
    for messages in CONVERSATIONS:
        try:
            text = render(subject.tokenizer, messages, subject.date, add_generation_prompt=True)
        except Exception:  # noqa: S112 - a template refuses what it does not know, such as a system's message
            continue
        expected = list(subject.tokenizer(text, add_special_tokens=False).input_ids)
        for way, ask in ways.items():
            found = ask(messages)
            if found is None:
                raise Wrong(f"{way} tells no token ids; expected those of the prompt")
            _same_ids(found, expected, way)
            compared += 1
        if not ways:
            count = subject.api.chat(messages, 1).prompt_count
            if count != len(expected):
                raise Wrong(
                    f"the server reads {count} tokens of a conversation; expected {len(expected)}, by the tokenizer"
                )
            compared += 1
    if not compared:
        raise NotOffered("the tokenizer's chat template renders none of the conversations")
    return f"{compared} {'conversations' if ways else 'counts of tokens'} equal"


def logprobs(subject: Subject) -> str:
    """Every token has a log-probability, and the greedy one is the most likely."""
    subject.needs("logprobs", "log-probabilities")
    answers = [subject.alone[0]]
    if subject.template.chat:
        answers.append(subject.api.chat(_QUESTION, SHORT))
    for answer in answers:
        values, best = answer.logprobs or [], answer.best or []
        wanted = len(answer.ids) if answer.ids is not None else answer.count
        if len(values) != wanted or len(best) != wanted:
            raise Wrong(f"{len(values)} log-probabilities and {len(best)} lists of the best; expected {wanted} of both")
        for place, (value, tops) in enumerate(zip(values, best, strict=True)):
            total = sum(math.exp(one) for _, one in tops)
            # servers compute in a coarse dtype, so allow its rounding
            if not value <= 0 or total > 1 + 1e-2:
                raise Wrong(f"token {place + 1} has {value:.3f}, the best of its place sum to {total:.3f}; expected 1")
            if value < tops[0][1] - subject.near:
                raise Wrong(f"token {place + 1} has {value:.3f}, the best of its place {tops[0][1]:.3f}; expected it")
    return f"{sum(len(answer.logprobs or ()) for answer in answers)} tokens"


def too_long(subject: Subject) -> str:
    """A request beyond the context is refused with status 400 and the limit, and the server goes on."""
    (token,) = subject.tokenizer("a", add_special_tokens=False).input_ids[:1]
    response = subject.api.post("/v1/completions", {"prompt": [token] * (subject.context + 1), "max_tokens": 1})
    if response.status_code != httpx.codes.BAD_REQUEST:
        raise Wrong(f"status {response.status_code} for {subject.context + 1} tokens; expected 400")
    if str(subject.context) not in response.text:
        raise Wrong(f"the refusal is {response.text[:200]}; expected it to name the limit, {subject.context}")
    _answers_on(subject, "a request that is too long")
    return f"400, names {subject.context}"


def cancellation(subject: Subject) -> str:
    """A request that its client leaves is given up, and the server goes on."""
    if subject.api.in_work() is None:
        raise NotOffered("the server does not count requests in work")
    tokens = subject.context - 64
    with subject.api.stream(subject.prompts[0], tokens, ignore_eos=True) as pieces:
        iterator = iter(pieces)
        next(iterator)
        started = time.monotonic()
        for _ in range(3):
            next(iterator)
        each = (time.monotonic() - started) / 3
    left, closed = each * (tokens - 4), time.monotonic()
    # much less than it would take to write on, so that an answer that runs to its end is noticed
    patience = min(PATIENCE, left / 4)
    if patience < HASTE:
        raise NotOffered(
            f"the longest answer takes only {left:.1f} s, so one that is not given up would not be noticed"
        )
    while subject.api.in_work():
        if time.monotonic() - closed > patience:
            raise Wrong(f"still in work {patience:.1f} s after its client left; expected none")
        time.sleep(0.05)
    ended = time.monotonic() - closed
    _answers_on(subject, "a cancelled request")
    return f"given up within {ended:.1f} s; it would have taken {left:.0f} s"


def tools(subject: Subject) -> str:
    """A request with tools is answered, if the chat template shows tools to the model."""
    subject.needs_chat()
    if not subject.template.tools:
        raise NotOffered("the chat template has no tools")
    if subject.template.parser is None and "any tools" not in subject.api.offers:
        raise NotOffered("no parser is known for the calls that the chat template teaches")
    answer = subject.api.chat(_QUESTION, NEW_TOKENS, tools=[TOOL], tool_choice="auto")
    if not answer.text and answer.count == 0:
        raise Wrong("an empty answer to a request with tools")
    return "answered"


def concurrent(subject: Subject) -> str:
    """Sixteen requests at once are answered as each alone."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        together = list(pool.map(lambda one: subject.api.complete(one, NEW_TOKENS), subject.prompts[:AT_ONCE]))
    return _all_same(subject.alone, together, subject.near, "at once")


CHECKS: dict[str, Callable[[Subject], str]] = {
    "models": models,
    "completions": completions,
    "chat": chat,
    "streaming": streaming,
    "batches": batches,
    "stop strings": stop_strings,
    "stop tokens": stop_tokens,
    "chat template": chat_template,
    "log-probabilities": logprobs,
    "too long a request": too_long,
    "cancellation": cancellation,
    "tools": tools,
    "sixteen at once": concurrent,
}


def check(name: str, subject: Subject) -> Finding:
    """Run one check; every error of the server is a finding."""
    try:
        return Finding(name, "passed", CHECKS[name](subject))
    except NotOffered as error:
        return Finding(name, "not offered", str(error))
    except Wrong as error:
        return Finding(name, "failed", str(error))
    except APIStatusError as error:
        return Finding(name, "failed", f"status {error.status_code}: {error.response.text[:200]}; expected an answer")
    except BROKEN as error:
        return Finding(name, "failed", f"{type(error).__name__}: {first_line(error)}; expected an answer")


def _whole(answer: Answer, asked: int) -> str:
    """Wrong if an answer is empty, or not as long as it says."""
    if answer.ids is not None and answer.count != len(answer.ids):
        raise Wrong(f"{len(answer.ids)} token ids, but a count of {answer.count}; expected as many")
    if not 0 < answer.count <= asked or (not answer.text and answer.finish != "stop"):
        raise Wrong(f"{answer.count} tokens, {answer.text!r}; expected up to {asked}")
    if answer.finish == "length" and answer.count != asked:
        raise Wrong(f"ended for its length after {answer.count} tokens; expected {asked}")
    if answer.finish not in ("length", "stop"):
        raise Wrong(f"ended with the reason {answer.finish}; expected length or stop")
    return f"{answer.count} tokens"


def parted(reference: Answer, other: Answer, near: float) -> str | None:
    """How two answers to the same prompt differ, beyond near-ties; None if they do not."""
    if reference.ids is not None and other.ids is not None:
        found = parting(
            [f"{ID}{one}" for one in reference.ids],
            reference.best or [],
            [f"{ID}{one}" for one in other.ids],
            near,
        )
    elif reference.tokens is not None and other.tokens is not None:
        found = parting(reference.tokens, reference.best or [], other.tokens, near)
    else:
        return None if reference.text == other.text else f"{other.text!r} instead of {reference.text!r}"
    if found is None:
        return (
            None if reference.text == other.text else f"equal tokens, but {other.text!r} instead of {reference.text!r}"
        )
    return None if found.near_tie else f"{other.text!r} instead of {reference.text!r} ({found})"


def _same(reference: Answer, other: Answer, near: float, how: str) -> None:
    if difference := parted(reference, other, near):
        raise Wrong(f"{how}: {difference}; expected the same up to near-ties")


def _all_same(alone: Sequence[Answer], together: Sequence[Answer], near: float, how: str) -> str:
    if len(alone) != len(together):
        raise Wrong(f"{len(together)} answers to {len(alone)} prompts {how}")
    for number, (one, other) in enumerate(zip(alone, together, strict=True), 1):
        _same(one, other, near, f"prompt {number}, {how}")
    ties = sum(one.text != other.text for one, other in zip(alone, together, strict=True))
    return f"{len(alone)} answers, {ties} of them part at a near-tie" if ties else f"{len(alone)} answers equal"


def _same_ids(found: Sequence[int], expected: Sequence[int], way: str) -> None:
    if list(found) != list(expected):
        place = next(
            (n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
        )
        raise Wrong(
            f"{way}: {len(found)} tokens, from token {place + 1} on {list(found)[place : place + 5]}; expected "
            f"{len(expected)} by the tokenizer's own template, there {list(expected)[place : place + 5]}"
        )


def _stop_string(answer: Answer) -> str | None:
    """A piece of an answer that does not stand earlier in it."""
    middle = len(answer.text) // 2
    pieces = (answer.text[middle : middle + size] for size in (3, 5, 8))
    return next((piece for piece in pieces if piece and answer.text.find(piece) == middle), None)


def _stopped_by(
    subject: Subject, option: str, choose: Callable[[Answer], Any], holds: Callable[[Answer, Any], bool]
) -> str:
    """Ask for the first answer in which something stands to stop at, again with that."""
    chosen = ((n, stop) for n, answer in enumerate(subject.alone) if (stop := choose(answer)) is not None)
    number, stop = next(chosen, (0, None))
    if stop is None:
        raise NotOffered("no answer holds anything to stop at")
    before = subject.alone[number]
    answer = subject.api.complete(subject.prompts[number], NEW_TOKENS, **{option: [stop]})
    if holds(answer, stop):
        raise Wrong(f"with {option} {stop!r}, it wrote {answer.text!r}; expected it to end there")
    if before.text.startswith(answer.text) and answer.finish != "stop":
        raise Wrong(f"ended at {stop!r} with the reason {answer.finish}; expected stop")
    if not before.text.startswith(answer.text) and parted(before, answer, subject.near):
        raise Wrong(f"with {option} {stop!r}, it wrote {answer.text!r}; expected the beginning of {before.text!r}")
    return f"ended at {stop!r}"


def _answers_on(subject: Subject, after: str) -> None:
    answer = subject.api.complete(subject.prompts[0], 2)
    if not answer.count:
        raise Wrong(f"no answer after {after}")
