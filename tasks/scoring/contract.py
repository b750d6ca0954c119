"""The evaluation contract: everything that must be equal for two evaluations to be comparable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import TaskError
from tasks.output import sha256
from tasks.text.bos import begins_with_bos
from tasks.text.chat import writes_date

if TYPE_CHECKING:
    from tasks.runtimes import Runtime
    from tasks.scoring.order import Order
    from tasks.settings import EvaluationSettings

TOKENIZER = ("tokenizer.json", "tokenizer.model", "chat_template.jinja")


def contract_of(
    settings: EvaluationSettings,
    runtime: Runtime,
    model: Path,
    raw: Path,
    definition: Mapping[str, Any],
    order: Order,
) -> dict[str, Any]:
    """The contract of an evaluation. definition: version and hash of each task. The hash covers all planned items,
    whether or not they are scored. The date is part of it where the prompts contain it."""
    data = json.loads((raw / "sources.json").read_text(encoding="utf-8"))
    return {
        "tasks": dict(definition),
        "limit": settings.limit,
        "order": order.record(),
        "shots": settings.shots,
        "chat_template": settings.chat_template,
        "bos": begins_with_bos(runtime.tokenizer),
        "seed": settings.seed,
        "engine": runtime.info.name,
        "device": runtime.info.device,
        "dtype": runtime.info.dtype,
        "texts": {text: data[text]["sha256"] for text in settings.texts},
        "text_tokens": settings.text_tokens,
        "window": settings.window,
        "data": {name: data[name]["sha256"] for name in settings.sources},
        "tokenizer": {name: sha256(model / name) for name in TOKENIZER if (model / name).exists()},
        "libraries": libraries(runtime),
        **({"chat_date": settings.chat_date} if settings.chat_template and writes_date(runtime.tokenizer) else {}),
    }


def libraries(runtime: Runtime) -> dict[str, str]:
    """Versions of the libraries that can change a score."""
    ours = {name: version(name) for name in ("torch", "transformers", "lm-eval", "datasets")}
    return {**runtime.libraries, **ours}


def contract_hash(contract: Mapping[str, Any]) -> str:
    """sha256 of a contract."""
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()


def same_contract(target: str, variant: str, baseline: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise TaskError, naming each differing field with both values, if the contracts of two reports differ."""
    ours, theirs = baseline["contract"], other["contract"]
    if baseline["contract_hash"] == other["contract_hash"] and ours == theirs:
        return
    fields = [f for f in sorted(ours.keys() | theirs.keys()) if ours.get(f) != theirs.get(f)]
    differences = "; ".join(f"{f} is {ours.get(f)!r} for base, {theirs.get(f)!r} for {variant}" for f in fields)
    differences = differences or "their contract hashes differ"
    raise TaskError(
        f"base and {variant} were not evaluated in the same way: {differences}. "
        f"Evaluate both again: dvc repro -f reference@{target} evaluate@{target}-{variant}"
    )
