"""Select the weight files of a model, and check that the model can be quantized."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks.errors import TaskError
from tasks.sources.known_types import known_type

_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_INDEX = "model.safetensors.index.json"


def weight_files(names: Iterable[str], where: str, index: Mapping[str, str] | None = None) -> list[str]:
    """The safetensors files of the weights; TaskError listing the files found if there are none. index: the file by
    tensor, of the model's index.

    One file, or shards, by transformers' names or those in the index; copies of the weights under other names are left
    out.
    """
    top = [n for n in names if "/" not in n]
    if "adapter_config.json" in top:
        raise TaskError(
            f"{where} holds an adapter (adapter_config.json), which transformers would load with, or instead of, the "
            "model; merge it into its base model, or remove adapter_config.json if it is already merged"
        )
    if _INDEX in top:
        if index and "model.safetensors" in top and "model.safetensors" not in index.values():
            raise TaskError(
                f"{where} has both model.safetensors and {_INDEX}, which names other files: transformers reads the "
                "first, other engines the second; keep one of them, in a local copy that you name as path:"
            )
        named = {*(index or {}).values()}
        return sorted(n for n in top if n in named or re.fullmatch(r"model-\d+-of-\d+\.safetensors", n))
    if "model.safetensors" in top:
        return ["model.safetensors"]
    tensors = [n for n in top if n.endswith(".safetensors")]
    if tensors:
        raise TaskError(
            f"{where} has {_few(tensors)}, but neither model.safetensors nor {_INDEX}, the file names of a "
            "complete model in transformers (merge an adapter into its base model first)"
        )
    pickles = [n for n in top if n.lower().endswith(_PICKLE)]
    if pickles:
        raise TaskError(
            f"{where} has weights only as {_few(pickles)}, which is refused because loading a pickle can run "
            "code; choose a revision or a repository with safetensors"
        )
    raise TaskError(f"{where} has no weights; expected model.safetensors or {_INDEX} (found {_few(top)})")


def read_index(files: Mapping[str, Path]) -> dict[str, str] | None:
    """The file by tensor that the index among a model's files names; None without an index, TaskError if it is none."""
    if _INDEX not in files:
        return None
    try:
        found = json.loads(files[_INDEX].read_text(encoding="utf-8"))["weight_map"]
    except ValueError as error:
        raise TaskError(f"{_INDEX} is not JSON: {error}; fetch or save it again") from error
    except (KeyError, TypeError) as error:
        raise TaskError(f"{_INDEX} has no weight_map, so it is no index; fetch or save it again") from error
    return {str(name): str(file) for name, file in found.items()}


def check_config(config: Any, where: str) -> None:
    """TaskError unless `config` (config.json) describes an unquantized decoder language model of transformers whose
    type can be pressed, as far as that is known.

    A model that needs custom Python code is refused: such code is never fetched and never run.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISION
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise TaskError(f"{where}: config.json has no model_type, so this is not a transformers model")
    quantization = config.get("quantization_config") or {}
    if quantization and not by_blocks(quantization):
        method = quantization.get("quant_method", "an unknown method")
        raise TaskError(
            f"{where} is already quantized ({method}); use the model in full precision, because a quantized "
            "baseline hides the loss of further quantization"
        )
    names = config.get("architectures") or []
    classes = _classes(CAUSAL.get(kind, ())) + _classes(VISION.get(kind, ()))
    both_ways = kind in MASKED and not config.get("is_decoder")  # its tokens see later ones as well
    if classes and any(n in classes for n in names or classes) and not config.get("is_encoder_decoder", both_ways):
        known = known_type(kind)
        if known and known.refused:
            raise TaskError(
                f"{where} is a {kind} model, and models of this type cannot be pressed: {known.refused} (found on a "
                f"tiny one, {known.tried}); choose another model, docs/models.md lists those that can be"
            )
        return
    what = f"{where} is a {kind} model ({', '.join(names) or 'no architecture named'})"
    code = config.get("auto_map", {}).get("AutoModelForCausalLM")
    if not classes and code is not None:
        raise TaskError(
            f"{what} that needs custom Python code ({code}), which is never run; choose a model that "
            "transformers supports, such as llama"
        )
    raise TaskError(f"{what}, for which transformers has no decoder language model; choose one such as llama")


def auto_class(config: Mapping[str, Any]) -> str:
    """The class of Transformers that loads the model of a config.json as the whole that it is, with a vision tower if
    it has one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISION

    kind, names = str(config.get("model_type")), set(config.get("architectures") or ())
    whole = kind in VISION and (names & {*_classes(VISION[kind])} or kind not in CAUSAL)
    return "AutoModelForImageTextToText" if whole else "AutoModelForCausalLM"


def by_blocks(quantization: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one of the two that models are published in by their makers: FP8 by blocks and
    MXFP4, which are dequantized on arrival (tasks/model/from_blocks.py)."""
    sizes = quantization.get("weight_block_size")
    fp8 = quantization.get("quant_method") == "fp8" and isinstance(sizes, list) and len(sizes) == 2
    return fp8 or quantization.get("quant_method") == "mxfp4"


def _classes(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
