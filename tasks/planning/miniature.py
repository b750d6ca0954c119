"""Small random models to measure on, cut from the configuration of a large one."""

from __future__ import annotations

import copy
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tasks.model.layout import linear_shapes
from tasks.output import write_manifest

WORDS = 512  # vocabulary of a model that stands for its decoder layers


class Miniature:
    """A model, its tokenizer and tokens, written below `root` when first used."""

    def __init__(self, root: Path, config: Any, dtype: str) -> None:
        self.config = config
        self._dtype = dtype
        self.folder = root / f"{config.num_hidden_layers}-{config.hidden_size}-{config.vocab_size}"

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


def narrowed(config: Any, factor: int, layers: int = 1) -> Any:
    """The configuration with about 1/`factor` of the channels and heads, `layers` decoder layers and `WORDS` words.

    The head width and, where possible, the number of queries per key head stay. So does the largest power of two, up to
    256, that divides the width of the MLP: groups of weights still fit.
    """
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    fewer = max(1, keys // factor)
    heads = fewer * max(1, queries // keys // max(1, factor * fewer // keys))
    unit = math.gcd(config.intermediate_size, 256)
    inner = max(unit, round(config.intermediate_size * heads / queries / unit) * unit)
    return _cut(config, (config.hidden_size * heads // queries, inner, heads, fewer), layers, WORDS)


def thin(config: Any, words: int) -> Any:
    """The configuration with `words` words and one layer with almost no weights."""
    return _cut(config, (config.hidden_size, 64, 1, 1), 1, words)


def _cut(config: Any, sizes: tuple[int, int, int, int], layers: int, words: int) -> Any:
    small = copy.deepcopy(config)
    small.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    small.hidden_size, small.intermediate_size, small.num_attention_heads, small.num_key_value_heads = sizes
    small.num_hidden_layers, small.vocab_size = layers, words
    small.bos_token_id, small.eos_token_id, small.pad_token_id = 0, 1, None
    if getattr(config, "layer_types", None):
        small.layer_types = config.layer_types[:layers]
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
