"""What an exported model's folder says of the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import StartError

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "genai_config.json", "tokenizer.json", "tokenizer_config.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
FLOAT = 4  # bytes of a number in the KV cache
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# sampling settings of the source that are the defaults of requests, as in vLLM
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Export:
    """Facts about a model.

    context: tokens. vocabulary: rows of the logits. cache_bytes: KV cache of one token. ends: ids of the tokens that
    end a text. special: special tokens by role, for the chat template. sampling: recommended settings.
    """

    folder: Path
    context: int
    vocabulary: int
    cache_bytes: int
    ends: tuple[int, ...]
    special: dict[str, str]
    template: str | None
    sampling: dict[str, float]


def read_export(folder: Path) -> Export:
    """Read the configuration of the model in `folder`; StartError if files are missing or cannot be read."""
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise StartError(f"{folder} holds no ONNX Runtime GenAI model (no {name}); name the exported folder")
    model = _json(folder / CONFIG).get("model", {})
    try:
        decoder = model["decoder"]
        numbers = decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]
        layers, heads, size = map(int, numbers)
        context, vocabulary = int(model["context_length"]), int(model["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise StartError(f"{folder / CONFIG} lacks {error}; export the model again") from error
    described = _json(folder / TOKENIZER_CONFIG)
    special = {role: _text(described[role]) for role in _SPECIAL if described.get(role) is not None}
    generation = _json(folder / GENERATION)
    ends = [*_ids(model.get("eos_token_id")), *_ids(generation.get("eos_token_id"))]
    return Export(
        folder=folder,
        context=context,
        vocabulary=vocabulary,
        cache_bytes=layers * heads * size * 2 * FLOAT,
        ends=tuple(dict.fromkeys(ends)),
        special=special,
        template=_template(folder, described),
        sampling={key: float(generation[key]) for key in _SAMPLING if generation.get(key) is not None},
    )


def _template(folder: Path, described: dict[str, Any]) -> str | None:
    """The chat template: of its own file, or of tokenizer_config.json (several: the one named default)."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    found = described.get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartError(f"{path} is not JSON ({error}); export the model again") from error
    return values if isinstance(values, dict) else {}


def _ids(value: Any) -> list[int]:
    return [int(one) for one in (value if isinstance(value, list) else [value]) if one is not None]


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
