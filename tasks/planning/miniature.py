"""Small random models to measure on, cut from the configuration of a large one."""

from __future__ import annotations

import copy
import hashlib
import math
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tasks.model.expert_fields import EXPERTS, VISITED, present
from tasks.model.hollow import hollow_model
from tasks.model.input_widths import input_widths
from tasks.model.layout import linear_shapes
from tasks.output import write_manifest

WORDS = 512  # vocabulary of a model that stands for its decoder layers
# fields of configurations, of which a model has some: sizes inside a layer, which shrink with it; numbers of groups
# that a router chooses from, and of first layers without experts
INNER = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "q_lora_rank",
    "kv_lora_rank",
)
EXPERT_GROUPS = ("n_group", "topk_group")
DENSE = ("first_k_dense_replace", "num_dense_layers")


class Miniature:
    """A model, its tokenizer and tokens, written below `root` when first used."""

    def __init__(self, root: Path, config: Any, dtype: str) -> None:
        self.config = config
        self._dtype = dtype
        name = hashlib.sha256(config.to_json_string().encode()).hexdigest()[:8]
        self.folder = root / f"{config.num_hidden_layers}-{config.hidden_size}-{name}"

    @cached_property
    def model(self) -> Path:
        """The model's directory, in the form that the stage download leaves."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        made: Any = AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, self._dtype))
        made.generation_config.eos_token_id = None
        made.save_pretrained(self.folder / "model")
        _tokenizer(self.config.vocab_size).save_pretrained(self.folder / "model")
        write_manifest(self.folder / "model")
        return self.folder / "model"

    @cached_property
    def weights(self) -> int:
        """The number of weights in the decoder's linear layers."""
        return sum(rows * width for rows, width in linear_shapes(self.model).values())

    def calibration(self, sequences: int, length: int) -> Path:
        """A directory with random sequences, in the form that the stage calibrate leaves."""
        directory = self.folder / f"calibration-{sequences}"
        if not directory.exists():
            directory.mkdir(parents=True)
            ids = torch.randint(self.config.vocab_size, (sequences, length))
            save_file({"input_ids": ids}, directory / "tokens.safetensors")
            write_manifest(directory)
        return directory


def visited(config: Any) -> Any:
    """The configuration of the layers that one token passes through: of a mixture, with as many experts as it visits.

    Unchanged for another model, or if the model with fewer experts does not run.
    """
    experts = present(config, EXPERTS)
    seen = [getattr(config, name) for name in present(config, VISITED)]
    if not experts or not seen:
        return config
    small = copy.deepcopy(config)
    for name in experts:
        setattr(small, name, min(getattr(config, name), max(seen)))
    for name in present(config, EXPERT_GROUPS):
        setattr(small, name, 1)
    return small if runs(narrowed(small, 10**6)) else config


def runs(config: Any) -> bool:
    """Whether a model of the configuration can be built, and its layers run."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return any(map(len, input_widths(hollow_model(config, "float32", Path(folder) / "model"))))
        except Exception:  # whatever the model's own code finds in a configuration that was not made for it
            return False


def narrowed(config: Any, factor: int, layers: int = 1) -> Any:
    """The configuration with about 1/`factor` of the channels and heads, `layers` decoder layers and `WORDS` words.

    The head width and, where possible, the number of queries per key head stay. So does the largest power of two, up to
    256 (64 of the hidden size), that divides a width: groups of weights still fit.
    """
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    fewer = max(1, keys // factor)
    heads = fewer * max(1, queries // keys // max(1, factor * fewer // keys))
    hidden = _share(config.hidden_size, heads / queries, 64)
    inner = {name: _share(getattr(config, name), heads / queries, 256) for name in present(config, INNER)}
    return _cut(config, inner | {"hidden_size": hidden}, (heads, fewer), layers, WORDS)


def thin(config: Any, words: int) -> Any:
    """The configuration with `words` words and one layer with almost no weights, and at most two experts, of which a
    token visits one: their inputs are as wide as the model."""
    sizes = {name: min(64, getattr(config, name)) for name in present(config, INNER)}
    sizes |= dict.fromkeys(present(config, EXPERTS), 2) | dict.fromkeys(present(config, VISITED), 1)
    return _cut(config, sizes, (1, 1), 1, words)


def _share(width: int, share: float, most: int) -> int:
    """About so much of a width, divided by the powers of two, up to `most`, that divide it."""
    unit = math.gcd(width, most)
    return max(unit, round(width * share / unit) * unit)


def _cut(config: Any, sizes: Mapping[str, int], heads: tuple[int, int], layers: int, words: int) -> Any:
    small = copy.deepcopy(config)
    small.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, value in sizes.items():
        setattr(small, name, value)
    small.num_attention_heads, small.num_key_value_heads = heads
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, value[-layers:])  # the last layers of a mixture have experts
    for name in present(config, DENSE):
        setattr(small, name, 0)
    small.num_hidden_layers, small.vocab_size = layers, words
    small.bos_token_id, small.eos_token_id, small.pad_token_id = 0, 1, None
    return small


def _tokenizer(words: int) -> Any:
    """A tokenizer of bytes, with words that occur in no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known += [f"<w{number}>" for number in range(words - len(known))]
    bpe = Tokenizer(models.BPE({word: number for number, word in enumerate(known)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=known[0], eos_token=known[1])
