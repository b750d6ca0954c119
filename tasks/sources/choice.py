"""Select the weight files of a model, and check that the model can be quantized."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tasks.errors import TaskError

_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_INDEX = "model.safetensors.index.json"


def weight_files(names: Iterable[str], where: str) -> list[str]:
    """The safetensors files of the weights; TaskError listing the files found if there are none.

    One file, or shards, by transformers' names; copies of the weights under other names are left out.
    """
    top = [n for n in names if "/" not in n]
    if _INDEX in top:
        return sorted(n for n in top if re.fullmatch(r"model-\d+-of-\d+\.safetensors", n))
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


def check_config(config: Any, where: str) -> None:
    """TaskError unless `config` (config.json) describes an unquantized decoder language model of transformers.

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
        return
    what = f"{where} is a {kind} model ({', '.join(names) or 'no architecture named'})"
    code = config.get("auto_map", {}).get("AutoModelForCausalLM")
    if not classes and code is not None:
        raise TaskError(
            f"{what} that needs custom Python code ({code}), which is never run; choose a model that "
            "transformers supports, such as llama"
        )
    raise TaskError(f"{what}, for which transformers has no decoder language model; choose one such as llama")


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
