"""Check a model's files when they arrive, headers before weights: correct what is harmless, refuse the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tqdm import tqdm

from tasks.errors import TaskError
from tasks.model.expert_fields import EXPERTS, VISITED, present
from tasks.model.skeleton import ties_output
from tasks.sources.choice import by_blocks
from tasks.tensor_files import BYTES, OUTPUT, Entry, read_header

INDEX = "model.safetensors.index.json"
_ROTARY = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")  # computed from config.json
_IGNORED = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_NAMED = 3  # tensors in a message


@dataclass
class Arrival:
    """What of a model's files counts. files: by file name, the tensors to take; index: their file by tensor, None for a
    single file; untied: config.json says tied, but the output layer has numbers of its own; corrections: what was
    changed, for source.json."""

    files: dict[str, dict[str, Entry]]
    index: dict[str, str] | None
    untied: bool = False
    corrections: list[str] = field(default_factory=list)

    def drop(self, name: str, why: str) -> None:
        """Leave out a tensor."""
        for entries in self.files.values():
            entries.pop(name, None)
        if self.index is not None:
            self.index.pop(name, None)
        self.corrections.append(f"{name} left out: {why}")


def inspect(weights: Mapping[str, Path], index: Mapping[str, str] | None, config: Mapping[str, Any]) -> Arrival:
    """Decide from the headers which tensors of the files `weights` count. index: the file by tensor that the model's
    index names; config: config.json.

    TaskError if a tensor is missing, has another shape than the model, or is none of the model's.
    """
    found = Arrival({name: read_header(path) for name, path in weights.items()}, dict(index) if index else None)
    if found.index is not None:
        _follow_index(found)
    for name in sorted(name for entries in found.files.values() for name in entries if _ROTARY.search(name)):
        found.drop(name, "a rotary table, which is computed from config.json")
    _check_tied(found, weights, config)
    _check_shapes(found, config)
    found.files = {name: entries for name, entries in found.files.items() if entries}
    return found


def _follow_index(found: Arrival) -> None:
    """The index decides which file holds a tensor; what it does not name is left out."""
    assert found.index is not None
    holders: dict[str, list[str]] = {}
    for file, entries in found.files.items():
        for name in entries:
            holders.setdefault(name, []).append(file)
    for name, file in sorted(found.index.items()):
        held = holders.get(name, [])
        if file in held:
            continue
        if len(held) != 1:
            where = f"{', '.join(held)} do" if held else "no file does"
            raise TaskError(
                f"the model's index says that {file} holds {name}, but it does not, and {where}; fetch it again"
            )
        found.index[name] = held[0]
        found.corrections.append(f"{name} is in {held[0]}, not in {file} as the index says")
    for file, entries in found.files.items():
        extra = [name for name in entries if found.index.get(name) != file]
        for name in extra:
            del entries[name]
        if extra:
            found.corrections.append(f"{file}: {_few(extra)} left out, which the index does not place there")


def _check_tied(found: Arrival, weights: Mapping[str, Path], config: Mapping[str, Any]) -> None:
    """A tied model may still have an output layer in its files: a copy is left out, another one is the model's own."""
    place = {name: file for file, entries in found.files.items() for name in entries}
    head = f"{OUTPUT}.weight"
    embedding = next((name for name in place if name.endswith("embed_tokens.weight")), None)
    if head not in place or embedding is None or not ties_output(known_config(config)):
        return
    tensors = []
    for name in (head, embedding):
        with safe_open(weights[place[name]], framework="pt") as file:
            tensors.append(file.get_tensor(name))
    own, copied = tensors
    if own.shape == copied.shape and bool((own == copied).all()):  # also if their types differ
        found.drop(head, f"equal to {embedding}, to which config.json ties it")
    else:
        found.untied = True
        found.corrections.append(f"tie_word_embeddings set to false: {head} differs from {embedding}")


def known_config(config: Mapping[str, Any]) -> Any:
    """Transformers' configuration of a config.json; TaskError if it cannot be read."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key not in ("quantization_config", *_IGNORED)}
    try:
        known = AutoConfig.for_model(**values)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise TaskError(f"Transformers cannot read config.json: {reason}; fetch the model again") from error
    _check_experts(known.get_text_config(decoder=True))
    return known


def _check_experts(text: Any) -> None:
    """TaskError if more experts are chosen for a token than there are."""
    chosen = next((name for name in VISITED if getattr(text, name, None) is not None), None)
    there = present(text, EXPERTS)
    if chosen is None or not there:
        return
    asked, count = getattr(text, chosen), getattr(text, there[0])
    if not 0 < asked <= count:
        raise TaskError(
            f"config.json says that {chosen} is {asked}, but {there[0]} is {count}; fetch the model again, or correct "
            "its config.json"
        )


def _check_shapes(found: Arrival, config: Mapping[str, Any]) -> None:
    """TaskError unless the tensors are those of the model that config.json describes, through Transformers' own names
    and conversions."""
    import torch

    from tasks.model.names import Names
    from tasks.model.skeleton import skeleton

    _check_types(found)
    known = known_config({**config, "tie_word_embeddings": False} if found.untied else config)
    model = skeleton(known, torch.float32, "cpu")
    held = {name: entry.shape for entries in found.files.values() for name, entry in entries.items()}
    names = Names(model, held)
    shapes = {name: torch.empty(shape, device="meta") for name, shape in held.items() if name not in names.strangers}
    made = {name: tuple(tensor.shape) for name, tensor in names.convert(shapes).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in made and names.ties.get(name) not in made]
    missing = sorted({*missing} - {*names.ignored(missing, missing=True)}, key=list(expected).index)
    ignored = {*names.ignored(names.strangers, missing=False)}
    extra = [name for name in names.strangers if name not in ignored]
    kind = config["model_type"]
    if missing == [f"{OUTPUT}.weight"] and not extra:
        raise TaskError(
            f"the files have no {OUTPUT}.weight, and config.json does not tie the output layer to the embedding; "
            "without it Transformers would draw random numbers. Fetch the model again, or set tie_word_embeddings to "
            "true in its config.json if it is tied"
        )
    if missing or extra:
        parts = [f"{len(missing)} are missing ({_few(missing)})"] if missing else []
        parts += [f"{len(extra)} are not part of it ({_few(extra)})"] if extra else []
        raise TaskError(
            f"the files do not hold the tensors of the {kind} model in config.json: {', '.join(parts)}; fetch the "
            "model again, or correct its config.json"
        )
    for name, shape in made.items():
        if name in expected and shape != expected[name]:
            raise TaskError(
                f"{name} has the shape {list(shape)}, but config.json describes {list(expected[name])}; fetch the "
                "model again, or correct its config.json"
            )


def _check_types(found: Arrival) -> None:
    """TaskError if a weight is stored in a type of quantized models."""
    for file, entries in found.files.items():
        for name, entry in entries.items():
            if name.endswith(".weight") and entry.dtype not in BYTES:
                raise TaskError(
                    f"{name} in {file} is stored as {entry.dtype}, but config.json says nothing of a quantized model; "
                    "use the model in full precision, or fetch it again with its own config.json"
                )


def read_json(path: Path) -> Any:
    """A JSON file that came with a model; TaskError if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TaskError(f"{path.name} is not JSON: {error}; fetch or save it again") from error


def clean_config(config: dict[str, Any], untied: bool) -> tuple[dict[str, Any], list[str]]:
    """config.json without what says nothing about the model, and what was changed."""
    values, corrections = dict(config), []
    if values.get("quantization_config", ...) is None:
        del values["quantization_config"]
        corrections.append("quantization_config: null removed from config.json")
    if by_blocks(values.get("quantization_config") or {}):
        del values["quantization_config"]
        corrections.append("quantization_config removed from config.json: the weights were dequantized")
    for key in _IGNORED:
        if values.pop(key, None) is not None:
            corrections.append(f"{key} removed from config.json: each machine chooses its own")
    if untied:
        values["tie_word_embeddings"] = False
    return values, corrections


def check_finite(folder: Path) -> None:
    """TaskError naming the first tensor of the safetensors files in `folder` that holds NaN or infinity."""
    files = sorted(folder.glob("*.safetensors"))
    for path in tqdm(files, desc="checking the weights", unit="file"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    count = int((~tensor.isfinite()).sum())
                    raise TaskError(
                        f"{name} holds {count} numbers that are not finite (NaN or infinity); the source is damaged: "
                        "fetch it again, or choose another revision"
                    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
