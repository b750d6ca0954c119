"""What decides how a model is spread over GPUs: its bytes, heads, widths, experts and KV cache."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.tensor_files import TensorFiles

_LAYER = re.compile(r"\.\d+\.")
# kinds of layers, in Transformers' words: the cache of these does not grow with the text; that of all others does
_WITHOUT_CACHE = ("linear_attention", "mamba", "recurrent", "conv", "mlp", "moe")
_WINDOWED = ("sliding_attention", "chunked_attention", "window_attention", "hybrid_sliding")
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_LONGEST = 10**9  # tokenizers write a huge number where they know no length
_ONNX = "genai_config.json"
_ONNX_FLOAT = 4  # bytes of a number in the KV cache of ONNX Runtime GenAI on a CPU


@dataclass(frozen=True)
class Shape:
    """layer_bytes, outer_bytes: of weights inside and outside the layers. heads, kv_heads: 0 without attention.
    kv_heads is also 0 where all heads share one compressed cache (MLA), which every GPU keeps whole. widths: those that
    tensor parallelism splits, by name; group: weights that share a scale along them. context: tokens, None if unknown.
    kv_token: bytes of KV cache for each token; kv_sequence: for each sequence, of layers with a window."""

    layer_bytes: int
    outer_bytes: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    widths: dict[str, int]
    group: int | None
    experts: int
    context: int | None
    kv_token: int
    kv_sequence: int

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.layer_bytes + self.outer_bytes


def read_shape(directory: Path) -> Shape:
    """Read the shape of the model in `directory`, a bundle with safetensors, GGUF or an ONNX graph."""
    if (directory / _ONNX).is_file():
        return _onnx_shape(directory)
    from transformers import AutoConfig  # takes seconds to import

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config()
    stored = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    heads = _largest(config, "num_attention_heads")
    latent = _largest(config, "kv_lora_rank")
    kv_heads = 0 if latent else _largest(config, "num_key_value_heads") or heads
    width = (_largest(config, "head_dim") or config.hidden_size // heads) if heads else 0
    numbers = latent + config.qk_rope_head_dim if latent else 2 * kv_heads * width
    layer_kv = numbers * _cache_bits(stored) // 8
    kinds = _kinds(config)
    windowed = sum(kind in _WINDOWED for kind in kinds)
    window = _largest(config, "sliding_window") or _largest(config, "attention_chunk_size")
    context = _context(directory, config)
    inside, outside = _weights(directory)
    return Shape(
        layer_bytes=inside,
        outer_bytes=outside,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=config.vocab_size,
        widths={name.replace("_", " "): size for name in _WIDTHS if (size := _largest(config, name))}
        | ({"attention width": heads * width} if heads else {}),
        group=max(_groups(stored), default=None),
        experts=next((n for name in _EXPERTS if (n := _largest(config, name))), 0),
        context=context,
        kv_token=layer_kv * sum(kind not in (*_WITHOUT_CACHE, *_WINDOWED) for kind in kinds),
        kv_sequence=layer_kv * min(window, context or window) * windowed,
    )


def _onnx_shape(directory: Path) -> Shape:
    """Of an export for ONNX Runtime GenAI, which caches the whole text in every layer. It runs on a CPU, so what tensor
    parallelism splits is left out."""
    model = json.loads((directory / _ONNX).read_text(encoding="utf-8"))["model"]
    decoder = model["decoder"]
    layers, heads, kv_heads, width = (
        int(decoder[key]) for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size")
    )
    return Shape(
        layer_bytes=sum(path.stat().st_size for path in directory.glob("*.onnx*")),
        outer_bytes=0,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=int(model["vocab_size"]),
        widths={},
        group=None,
        experts=0,
        context=int(model["context_length"]),
        kv_token=2 * layers * kv_heads * width * _ONNX_FLOAT,
        kv_sequence=0,
    )


def _largest(config: Any, name: str) -> int:
    """An attribute, or its largest value where layers differ; 0 if there is none."""
    try:
        values = getattr(config, name, None)
    except RuntimeError:  # of Transformers, where layers differ
        layers = config.per_layer_config
        values = [getattr(one, name, None) for one in (layers.values() if isinstance(layers, dict) else layers)]
    return max((int(n) for n in (values if isinstance(values, list | tuple) else [values]) if n), default=0)


def _kinds(config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return list(kinds or ["full_attention"] * config.num_hidden_layers)


def _context(directory: Path, config: Any) -> int | None:
    """The shorter of the model's and the tokenizer's length, as vLLM takes it."""
    lengths = [getattr(config, "max_position_embeddings", None)]
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.is_file():
        lengths.append(json.loads(tokenizer.read_text(encoding="utf-8")).get("model_max_length"))
    known = [int(n) for n in lengths if n and n < _LONGEST]
    return min(known) if known else None


def _weights(directory: Path) -> tuple[int, int]:
    """Bytes of weights inside and outside the layers; of a GGUF file all inside."""
    if packed := list(directory.glob("*.gguf")):
        return sum(path.stat().st_size for path in packed), 0
    files = TensorFiles(directory)
    inside = sum(files.entry(name).bytes for name in files if _LAYER.search(name))
    return inside, sum(files.entry(name).bytes for name in files) - inside


def _cache_bits(stored: dict[str, Any]) -> int:
    """Bits of a number in the KV cache, with vLLM's kv-cache-dtype auto: the scheme's, or those of the 16-bit dtype."""
    return int((stored.get("kv_cache_scheme") or {}).get("num_bits") or 16)


def _groups(stored: dict[str, Any]) -> Iterator[int]:
    """The group sizes in a quantization_config of any format."""
    for scheme in ({"weights": stored}, *(stored.get("config_groups") or {}).values()):
        size = (scheme.get("weights") or {}).get("group_size")
        if isinstance(size, int) and size > 0:
            yield size
