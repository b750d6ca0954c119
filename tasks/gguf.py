"""A model out of a GGUF file: its tensors dequantized and written as safetensors, with its tokenizer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import TaskError
from tasks.sources.files import require_space, size
from tasks.weights import BYTES, DTYPES

Grid = dict[str, int | bool]

# how these types place their values: a round-to-nearest quantization to the same grid would lose nothing
_GRIDS: dict[str, Grid] = {
    "Q4_0": {"bits": 4, "group_size": 32, "symmetric": True},
    "Q4_1": {"bits": 4, "group_size": 32, "symmetric": False},
    "Q8_0": {"bits": 8, "group_size": 32, "symmetric": True},
}
_FULL = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Quantized:
    """How the weights of a GGUF file are held: the type of most of them (None: full precision), and its grid."""

    type: str | None
    grid: Grid | None
    parameters: int


def inspect(path: Path) -> Quantized:
    """Read the tensor types of a GGUF file; TaskError if it is none.

    Types and grids as in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise TaskError(f"{path.name} is no whole GGUF file ({error}); fetch it again") from error
    count: Counter[str] = Counter()
    for tensor in tensors:
        count[tensor.tensor_type.name] += int(tensor.n_elements)
    if not count:
        raise TaskError(f"{path.name} holds no tensors; expected a GGUF file of a whole model")
    most = count.most_common(1)[0][0]
    return Quantized(None if most in _FULL else most, _GRIDS.get(most), count.total())


def dequantize(path: Path, destination: Path, dtype: str) -> Quantized:
    """Write the model in the GGUF file at `path` to the folder `destination` in `dtype`, with its tokenizer.

    The whole model is in memory meanwhile. TaskError if transformers cannot read this kind of model from a GGUF.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = inspect(path)
    needed = found.parameters * BYTES[DTYPES[dtype]]
    require_space(destination, needed, f"dequantizing {path.name}")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=getattr(torch, dtype), trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise TaskError(
            f"transformers cannot read {path.name} ({size(path.stat().st_size)}): {error}; use the model's "
            "safetensors instead"
        ) from error
    # the weights are plain numbers now, but the loaded model still calls itself quantized and refuses to be saved
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = tokenizer.name_or_path = ""
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    return found
