"""The tokens that end a generated text, from generation_config.json and the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_tokens(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all end tokens of the model in `directory`: the tokenizer's EOS first, then those that
    generation_config.json names beside it, in its order. Empty if there are none.

    Raises ValueError if generation_config.json is not JSON.
    """
    path = directory / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    numbers = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(n for n in (tokenizer.eos_token_id, *numbers) if n is not None))
