"""The beginning-of-sequence token (BOS): whether a model expects it, and exactly one of it.

Omitting it, or writing it twice, can silently halve a score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer, and so its model, starts a text with a beginning-of-sequence token."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text for the model, with the tokenizer's special tokens unless the text already begins with BOS:
    many chat templates write it."""
    bos = tokenizer.bos_token
    return list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids)


def without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text without its BOS, where the tokenizer adds one itself; else unchanged."""
    return text.removeprefix(str(tokenizer.bos_token)) if begins_with_bos(tokenizer) else text
