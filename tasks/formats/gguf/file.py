"""Write a whole model as one GGUF file: weights, configuration and tokenizer.

Quantized layers are transcoded (tasks/formats/gguf/blocks.py), one in memory at a time. The metadata is that of
llama.cpp's converter (https://github.com/ggml-org/llama.cpp/tree/master/conversion).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from tasks.errors import TaskError
from tasks.formats.gguf.blocks import FLOATS, block_type, pack_blocks, plain
from tasks.formats.gguf.vocabulary import add_vocabulary
from tasks.formats.stored import StoredModel
from tasks.output import write_json
from tasks.rope import rope_parameters
from tasks.tensor_files import EMBEDDING, OUTPUT

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAME = "model.gguf"
# llama.cpp's names of the families; the first two need the rows of queries and keys reordered
FAMILIES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_FILE_TYPES = {
    Type.F32: gguf.LlamaFileType.ALL_F32,
    Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
}


@dataclass(frozen=True)
class _Part:
    """One tensor of the file; `read` gives its bytes, uint8 [..., bytes]."""

    name: str
    shape: tuple[int, ...]
    type: Type
    read: Callable[[], NDArray[np.uint8]]


def write_gguf(model: Path, destination: Path) -> None:
    """Write the model of the directory `model` to the folder `destination`: model.gguf, and a config.json without
    quantization_config. TaskError if llama.cpp does not support the model, its tokenizer or its weight types.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    stored = StoredModel(model)
    check_family(config, str(model))
    arch = FAMILIES[config["model_type"]]
    parts = _parts(stored, config, arch)
    writer = gguf.GGUFWriter(destination / NAME, gguf.MODEL_ARCH_NAMES[arch])
    _add_configuration(writer, config)
    weights: Counter[Type] = Counter()
    for part in parts:
        weights[part.type] += math.prod(part.shape) if part.name.startswith("blk.") else 0
    writer.add_file_type(_FILE_TYPES[weights.most_common(1)[0][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    (rows,) = (part.shape[0] for part in parts if part.name == "token_embd.weight")
    add_vocabulary(writer, model, rows)
    for part in parts:
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), _size(part), raw_dtype=part.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in parts:
        writer.write_tensor_data(part.read())
    writer.close()
    config.pop("quantization_config", None)
    write_json(destination / "config.json", config)


def check_family(config: dict[str, Any], where: str) -> None:
    """TaskError if the target gguf does not support the family or a feature of this config.json."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise TaskError(f"{where} is of type {family!r}; the target gguf supports {', '.join(FAMILIES)}")
    turn = rope_parameters(config)["rope_type"]
    if turn not in ("default", "linear", "llama3"):
        raise TaskError(f"{where} has rope_type {turn!r}; the target gguf supports default, linear and llama3")
    if config.get("hidden_act", "silu") != "silu":
        raise TaskError(f"{where} has hidden_act {config['hidden_act']!r}; llama.cpp's {family} supports only silu")


def _parts(stored: StoredModel, config: dict[str, Any], arch: gguf.MODEL_ARCH) -> list[_Part]:
    """All tensors of the file, in the order of the model's files."""
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    tied = bool(config.get("tie_word_embeddings"))
    parts = []
    for name in stored.dense:
        # the rotary table is computed, a tied output layer is the embedding
        if "rotary_emb" in name or (name == f"{OUTPUT}.weight" and tied):
            continue
        parts.append(_dense(stored, name, _name(names, name), _order(name, config)))
    for name in stored.quantized:
        linear = stored.linear(name)
        kind = block_type(name, linear.weight, linear.precision.grid.bits)
        order = _order(name, config)

        def read(name: str = name, kind: Type = kind, order: Tensor | None = order) -> NDArray[np.uint8]:
            return _rows(pack_blocks(stored.linear(name).weight, kind), order)

        shape = tuple(linear.weight.integers.shape)
        own = EMBEDDING if name == OUTPUT and tied else name
        parts.append(_Part(_name(names, f"{own}.weight"), shape, kind, read))
    if rope_parameters(config)["rope_type"] == "llama3":
        factors = _llama3_factors(config)
        parts.append(_Part("rope_freqs.weight", tuple(factors.shape), Type.F32, lambda: plain(factors)))
    return parts


def _dense(stored: StoredModel, name: str, own: str, order: Tensor | None) -> _Part:
    tensor = stored.tensor(name)
    shape = tuple(tensor.shape)
    # llama.cpp requires vectors in float32
    kind = FLOATS[tensor.dtype] if len(shape) > 1 else Type.F32

    def read() -> NDArray[np.uint8]:
        tensor = stored.tensor(name)
        return _rows(plain(tensor.float() if kind == Type.F32 else tensor), order)

    return _Part(own, shape, kind, read)


def _size(part: _Part) -> int:
    block, size = gguf.GGML_QUANT_SIZES[part.type]
    return math.prod(part.shape) // block * size


def _name(names: gguf.TensorNameMap, name: str) -> str:
    own = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if own is None:
        raise TaskError(f"the model has the tensor {name}, which llama.cpp does not support in this family")
    return own


def _order(name: str, config: dict[str, Any]) -> Tensor | None:
    """llama.cpp's row order of a query or key layer: its rotary embedding rotates neighbours, that of transformers the
    two halves of a head. None: unchanged."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    layer = next((part for part in name.split(".") if part in heads), None)
    if layer is None or FAMILIES[config["model_type"]] != gguf.MODEL_ARCH.LLAMA:
        return None
    count = config.get(heads[layer]) or config["num_attention_heads"]
    return torch.arange(count * _head(config)).view(count, 2, -1).transpose(1, 2).flatten()


def _rows(data: NDArray[np.uint8], order: Tensor | None) -> NDArray[np.uint8]:
    if order is None:
        return data
    if data.ndim == 1:  # a bias
        return np.ascontiguousarray(data.reshape(len(order), -1)[order.numpy()].reshape(-1))
    return np.ascontiguousarray(data[order.numpy()])


def _head(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _llama3_factors(config: dict[str, Any]) -> Tensor:
    """Llama 3's divisor of each frequency: float32 [head / 2] (transformers, modeling_rope_utils.py)."""
    rope, size = rope_parameters(config), _head(config)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((rope["original_max_position_embeddings"] / wavelength - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()


def _add_configuration(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    context = config["max_position_embeddings"]
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        context = min(context, config["sliding_window"])  # within it, equal to full attention
    heads, rope = config["num_attention_heads"], rope_parameters(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_context_length(context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(_head(config))
    writer.add_value_length(_head(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(_head(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
