"""What the server and its engine's process tell each other: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .sampling import Sampling, Scored
from .sequence import Ended, Event, Failed, PromptScored, Sequence, Written


def line(values: dict[str, Any]) -> bytes:
    """One message."""
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def pack_sequence(one: Sequence) -> dict[str, Any]:
    """A sequence without its receiver."""
    return {
        "prompt": one.prompt,
        "most": one.most,
        "least": one.least,
        "sampling": asdict(one.sampling),
        "seed": one.seed,
        "ends": sorted(one.ends),
        "logprobs": one.logprobs,
        "prompt_logprobs": one.prompt_logprobs,
    }


def unpack_sequence(values: dict[str, Any], send: Callable[[Event], None]) -> Sequence:
    """The sequence of `pack_sequence`."""
    sampling = values["sampling"]
    sampling["bias"] = {int(number): bias for number, bias in sampling["bias"].items()}
    further = {"prompt": tuple(values["prompt"]), "ends": frozenset(values["ends"]), "sampling": Sampling(**sampling)}
    return Sequence(**{**values, **further}, send=send)


def pack_event(event: Event) -> dict[str, Any]:
    """An event."""
    match event:
        case Written():
            return {"kind": "written", "token": _pack(event.token), "last": event.last}
        case PromptScored():
            return {"kind": "prompt", "tokens": [_pack(token) for token in event.tokens]}
        case Failed():
            return {"kind": "failed", "status": event.status, "message": event.message}
        case Ended():
            return {"kind": "ended"}


def unpack_event(values: dict[str, Any]) -> Event:
    """The event of `pack_event`."""
    match values["kind"]:
        case "written":
            token = _unpack(values["token"])
            assert token is not None
            return Written(token, values["last"])
        case "prompt":
            tokens = (_unpack(token) for token in values["tokens"])
            return PromptScored(tuple(token for token in tokens if not isinstance(token, int)))
        case "failed":
            return Failed(values["status"], values["message"])
        case _:
            return Ended()


def _pack(token: Scored | int | None) -> Any:
    return [token.id, token.logprob, token.rank, token.best] if isinstance(token, Scored) else token


def _unpack(values: Any) -> Scored | int | None:
    if not isinstance(values, list):
        found: int | None = values
        return found
    number, logprob, rank, best = values
    return Scored(number, logprob, rank, tuple((other, its) for other, its in best))
