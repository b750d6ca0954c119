"""Render conversations with a model's chat template, so that the text does not depend on the day of the run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for today's date, as Llama's templates do since 3.1."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], date: str, **options: Any) -> str:
    """Render messages with the chat template, which takes `date` (YYYY-MM-DD) for today.

    Raises whatever the template raises.
    """
    if writes_date(tokenizer):
        options["strftime_now"] = datetime.fromisoformat(date).strftime
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
