"""Which weights of a model's folder or repository are taken, and whether the model can be pressed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tasks.errors import TaskError

_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_INDEX = "model.safetensors.index.json"


def weight_files(names: Iterable[str], where: str) -> list[str]:
    """The safetensors files that hold the weights; TaskError naming what is there if there are none.

    One file or shards as transformers names them: copies of the weights under other names are left out.
    """
    top = [n for n in names if "/" not in n]
    if _INDEX in top:
        return sorted(n for n in top if re.fullmatch(r"model-\d+-of-\d+\.safetensors", n))
    if "model.safetensors" in top:
        return ["model.safetensors"]
    tensors = [n for n in top if n.endswith(".safetensors")]
    if tensors:
        raise TaskError(
            f"{where} has {_few(tensors)}, but neither model.safetensors nor {_INDEX}: no whole model under "
            "the names that transformers knows (an adapter must be merged into its base model first)"
        )
    pickles = [n for n in top if n.lower().endswith(_PICKLE)]
    if pickles:
        raise TaskError(
            f"{where} has its weights only as {_few(pickles)}; such a file can run code when it is read, "
            "so it is refused; choose a revision or a repository with safetensors"
        )
    raise TaskError(f"{where} has no weights; expected model.safetensors or {_INDEX} (found {_few(top)})")


def check_config(config: Any, where: str) -> None:
    """TaskError unless `config` (config.json) is of a decoder language model in full precision that transformers knows.

    A model that needs Python code of its own is refused: such code is never taken along and never run.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise TaskError(f"{where}: config.json names no model_type, so it is no model of transformers")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise TaskError(
            f"{where} is already quantized ({method}); name the model in full precision, since a baseline "
            "that has lost quality already hides what is lost on top"
        )
    names = config.get("architectures") or []
    fits = kind in KNOWN and (not names or any(n in _classes(KNOWN[kind]) for n in names))
    if fits and not config.get("is_encoder_decoder"):
        return
    what = f"{where} is a {kind} model ({', '.join(names) or 'no architecture named'})"
    code = config.get("auto_map", {}).get("AutoModelForCausalLM")
    if kind not in KNOWN and code is not None:
        raise TaskError(
            f"{what} that needs Python code of its own ({code}), which is never run; choose a model that "
            "transformers knows, such as llama"
        )
    raise TaskError(f"{what}, which transformers knows no decoder language model for; choose one such as llama")


def _classes(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
