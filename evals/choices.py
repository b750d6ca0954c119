"""Parse multiple-choice data sets for lm-eval, in which the options of an item are one string."""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset

_MARKER = re.compile(r"^([A-Z])\. ?", re.MULTILINE)


def split_options(options: str) -> list[str]:
    """ "A. one\\nB. two" -> ["one", "two"]. Only consecutive letters count as markers."""
    starts: list[tuple[int, int]] = []
    for match in _MARKER.finditer(options):
        if match.group(1) == chr(ord("A") + len(starts)):
            starts.append(match.span())
    ends = [start for start, _ in starts[1:]] + [len(options)]
    return [options[text:end].strip() for (_, text), end in zip(starts, ends, strict=False)]


def answer_index(options: str, answer: str) -> int | None:
    """The index of `answer`, a full option with or without its letter; None if it is not an option."""
    choices = split_options(options)
    bare = _MARKER.sub("", answer.strip(), count=1).strip()
    return choices.index(bare) if bare in choices else None


def multiple_choice(data: Dataset) -> Dataset:
    """Add `choices` and `gold` to items of (question, options, answer); drop items whose answer is not an option."""
    usable = data.filter(lambda item: answer_index(item["options"], item["answer"]) is not None)
    return usable.map(_with_choices)


def _with_choices(item: dict[str, Any]) -> dict[str, Any]:
    return {
        "question": item["question"].strip(),
        "choices": split_options(item["options"]),
        "gold": answer_index(item["options"], item["answer"]),
    }


def yes_no(data: Dataset) -> Dataset:
    """Add `gold` (0 no, 1 yes) to items of (passage, question, answer "True" or "False")."""
    return data.map(lambda item: {"gold": int(str(item["answer"]).strip().lower() == "true")})
