"""What a request asks for: its prompts as token ids, and how to generate after them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .errors import RequestError
from .sampling import Sampling
from .schemas import REFUSED, Chat, Completion, Generation, Tokenize
from .sequence import Event, Sequence
from .served import Served

Prompt = tuple[int, ...]
COMPLETION_TOKENS = 16  # as OpenAI and vLLM
MOST_TEXTS = 128  # of one request
MOST_STOPS = 16


def check(request: Generation, served: Served) -> None:
    """RequestError for another model (404) and for fields that this server does not support (400)."""
    check_name(request.model, served)
    for name, value in (request.model_extra or {}).items():
        if name in REFUSED and value not in REFUSED[name]:
            raise RequestError(400, f"this server does not support {name}; leave it out", name)
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError(400, "prompt_logprobs are not streamed; set stream to false", "prompt_logprobs")


def check_name(name: str | None, served: Served) -> None:
    """RequestError for another model."""
    if name not in (None, "", served.name):
        raise RequestError(404, f"the model {name!r} is not served here; this server has {served.name!r}", "model")


def completion_prompts(request: Completion, served: Served) -> list[Prompt]:
    """The prompts of a request; texts get the tokenizer's special tokens unless add_special_tokens is false."""
    given = request.prompt
    prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not prompts or len(prompts) * request.n > MOST_TEXTS:
        found = len(prompts) * request.n
        raise RequestError(400, f"the request asks for {found} texts, expected 1 to {MOST_TEXTS}", "prompt")
    found_ids = []
    for prompt in prompts:
        ids = _encode(prompt, request.add_special_tokens, served) if isinstance(prompt, str) else prompt
        found_ids.append(_checked(ids, served, "prompt"))
    return found_ids


def chat_prompt(request: Chat, served: Served) -> Prompt:
    """The prompt of a conversation, by the model's chat template."""
    if request.tools and request.tool_choice != "none":
        place = (
            "describes tools, but this server reads no tool calls" if _has_tools(served) else "has no place for tools"
        )
        raise RequestError(
            400, f"the chat template of {served.name} {place}; send no tools, or set tool_choice to 'none'", "tools"
        )
    text = _render(request.messages, request.add_generation_prompt, request.chat_template_kwargs, None, served)
    return _checked(_encode(text, request.add_special_tokens, served), served, "messages")


def tokens(request: Tokenize, served: Served) -> list[int]:
    """The ids that /tokenize answers."""
    check_name(request.model, served)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError(400, "expected either prompt or messages", "prompt")
    if request.prompt is not None:
        return _encode(request.prompt, request.add_special_tokens is not False, served)
    further = request.chat_template_kwargs
    text = _render(request.messages or [], request.add_generation_prompt, further, request.tools, served)
    return _encode(text, bool(request.add_special_tokens), served)


def check_ids(ids: Iterable[int], served: Served, param: str) -> None:
    """RequestError for ids that the model has no embedding for."""
    unknown = [number for number in ids if not served.vocabulary.contains(number)]
    if unknown:
        most = served.export.vocabulary - 1
        raise RequestError(400, f"{param} holds the token id {unknown[0]}; this model's are 0 to {most}", param)


def stop_strings(request: Generation) -> list[str]:
    """The strings that end a text."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MOST_STOPS or "" in stops:
        raise RequestError(400, f"stop must be at most {MOST_STOPS} strings, none of them empty", "stop")
    return stops


def make_sequence(
    request: Generation, prompt: Prompt, number: int, served: Served, send: Callable[[Event], None]
) -> Sequence:
    """The text `number` (from 0) of n after this prompt. RequestError if it does not fit the context."""
    echo = isinstance(request, Completion) and request.echo
    if isinstance(request, Chat):
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        if request.top_logprobs and not request.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    else:
        logprobs = request.logprobs if isinstance(request, Completion) else None
    wanted = [best for best in (request.prompt_logprobs, logprobs if echo else None) if best is not None]
    most = _most(request, len(prompt), served)
    if most == 0 and not (echo or wanted):
        raise RequestError(400, "max_tokens is 0, which is possible only with echo or prompt_logprobs", "max_tokens")
    check_ids(request.stop_token_ids or (), served, "stop_token_ids")
    ends = frozenset((*(() if request.ignore_eos else served.export.ends), *(request.stop_token_ids or ())))
    return Sequence(
        prompt=prompt,
        most=most,
        least=request.min_tokens,
        sampling=_sampling(request, served),
        seed=None if request.seed is None else (request.seed + number) % 2**64,
        send=send,
        ends=ends,
        logprobs=logprobs,
        prompt_logprobs=max(wanted) if wanted else None,
    )


def _most(request: Generation, prompt: int, served: Served) -> int:
    """Tokens to generate at most: as asked for, else 16 of a completion and all that fit of a chat."""
    asked = request.max_tokens
    if isinstance(request, Chat):
        asked = request.max_completion_tokens if request.max_completion_tokens is not None else asked
        if asked is None:
            asked = max(1, served.context - prompt)
    elif asked is None:
        asked = min(COMPLETION_TOKENS, max(1, served.context - prompt))
    if prompt + asked > served.context:
        raise RequestError(
            400,
            f"the model's context length is {served.context} tokens, but {prompt + asked} were asked for ({prompt} of "
            f"the prompt and {asked} to generate); shorten the prompt or lower max_tokens",
            "max_tokens" if prompt < served.context else "messages" if isinstance(request, Chat) else "prompt",
        )
    return asked


def _sampling(request: Generation, served: Served) -> Sampling:
    """The request's settings; those it leaves out are the source's recommended ones."""
    defaults = served.export.sampling

    def value(name: str, otherwise: float) -> float:
        given = getattr(request, name)
        return float(defaults.get(name, otherwise) if given is None else given)

    bias = request.logit_bias or {}
    check_ids(bias, served, "logit_bias")
    return Sampling(
        temperature=value("temperature", 1.0),
        top_p=value("top_p", 1.0),
        top_k=max(0, int(value("top_k", 0))),
        min_p=value("min_p", 0.0),
        repetition_penalty=value("repetition_penalty", 1.0),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        bias=bias,
    )


def _has_tools(served: Served) -> bool:
    return served.template is not None and served.template.tools


def _encode(text: str, special: bool, served: Served) -> list[int]:
    try:
        return served.vocabulary.encode(text, special)
    except (TypeError, UnicodeEncodeError) as error:
        raise RequestError(400, "the text holds half of a surrogate pair, which no tokenizer can read") from error


def _checked(ids: list[int], served: Served, param: str) -> Prompt:
    if not ids:
        raise RequestError(400, "the prompt is empty; it needs at least one token", param)
    check_ids(ids, served, param)
    return tuple(ids)


def _render(
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    further: dict[str, Any] | None,
    tools: list[dict[str, Any]] | None,
    served: Served,
) -> str:
    if served.template is None:
        raise RequestError(400, f"{served.name} has no chat template; use /v1/completions", "messages")
    plain = [_plain(message) for message in messages]
    return served.template.render(
        plain, add_generation_prompt, {**(further or {}), **({"tools": tools} if tools else {})}
    )


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one text; parts are joined with line breaks, as vLLM joins them."""
    if not isinstance(message.get("role"), str):
        raise RequestError(400, "a message has no role; expected, for example, 'user'", "messages")
    content = message.get("content")
    if isinstance(content, list):
        kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
        if kinds - {"text"} or not all(isinstance(part.get("text"), str) for part in content):
            raise RequestError(400, "a message has parts that are not text; this model reads text only", "messages")
        content = "\n".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise RequestError(400, "the content of a message must be a string or a list of text parts", "messages")
    return {**message, "content": "" if content is None else content}
