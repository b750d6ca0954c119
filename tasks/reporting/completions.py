"""The variants' greedy texts beside the baseline's: where each parts from it, and whether that was a near-tie.

The files are tasks/scoring/completions.py's. Flows read the comparison from the summary, and format it here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.errors import TaskError
from tasks.reporting.number_format import percent
from tasks.reporting.records import read_lines

FILE = "texts.jsonl"
NEAR_TIE = 0.1  # nats: the baseline finds its own token at most 1.1 times as likely as the variant's
_KEYS = frozenset({"prompt", "prompt_ids", "ids", "text", "best_ids", "best_logprobs"})

Values = Mapping[str, Any]


def compare(results: Path, variants: Sequence[str], baseline: str, target: str) -> list[dict[str, Any]]:
    """For each prompt {prompt, texts: by variant}, the baseline's first.

    A text: `text`; `tokens`; `shared`: tokens that are the baseline's, from the start; `lead`: by how many nats the
    baseline prefers its own next token to the variant's, None if all are the baseline's or the variant's token is not
    among its two best; `near_tie`: whether that is at most `NEAR_TIE`. TaskError if a file is missing or unreadable, or
    if the prompts differ.
    """
    names = [baseline, *(name for name in variants if name != baseline)]
    lines = {name: _read(results / name / FILE, f"evaluate@{target}-{name}") for name in names}
    theirs = lines[baseline]
    for name, found in lines.items():
        if [(one["prompt"], one["prompt_ids"]) for one in found] != [(b["prompt"], b["prompt_ids"]) for b in theirs]:
            raise TaskError(
                f"{results / name / FILE} continues other prompts than {baseline}'s; "
                f"make both again: dvc repro evaluate@{target}-{baseline} evaluate@{target}-{name}"
            )
    return [
        {
            "prompt": base["prompt"],
            "texts": {name: _beside(base, found[number]) for name, found in lines.items()},
        }
        for number, base in enumerate(theirs)
    ]


def count(compared: Sequence[Values], variant: str) -> dict[str, Any]:
    """`texts`; `same`: texts that are the baseline's, whole; `near_ties`: others that part at one; `shared`: share of
    all the variant's tokens before it parts."""
    found = [one["texts"][variant] for one in compared]
    return {
        "texts": len(found),
        "same": sum(one["shared"] == one["tokens"] for one in found),
        "near_ties": sum(one["near_tie"] for one in found),
        "shared": sum(one["shared"] for one in found) / sum(one["tokens"] for one in found),
    }


def parting(found: Values) -> str:
    """Where a text parts from the baseline's, in words."""
    if found["shared"] == found["tokens"]:
        return "the same text"
    after = f"parts after {found['shared']} of {found['tokens']} tokens" if found["shared"] else "parts at once"
    if found["lead"] is None:
        return after
    return f"{after}, {'a near-tie' if found['near_tie'] else 'second choice'} ({found['lead']:.2f} nats)"


def counted(name: str, row: Values) -> str:
    """A sentence on a variant's texts; empty without any."""
    if not (found := row.get("completions")):
        return ""
    ties = f", and {found['near_ties']} of the others part at a near-tie" if found["same"] < found["texts"] else ""
    return (
        f"{name} writes {found['same']} of {found['texts']} texts as the baseline does{ties}; "
        f"{percent(found['shared'], 0)} of its tokens come before it parts."
    )


def parts(base: str, text: str) -> tuple[str, str]:
    """A text as what it shares with the baseline's and the rest."""
    shared = _shared(base, text)
    return text[:shared], text[shared:]


LEGEND = (
    "Each model continues the same prompts greedily, without a chat template, in the runtime that evaluates. A text "
    "parts where its token is not the baseline's. Second choice: the token is the baseline's second, that many nats "
    f"behind. Near-tie: a second choice at most {NEAR_TIE:g} nats behind, almost as likely as the first."
)


def markdown(summary: Values, most: int | None = None) -> str:
    """The texts side by side as Markdown. most: only so many prompts, and how many more there are."""
    compared: list[Values] = summary.get("completions") or []
    shown = compared[:most]
    lines = [counted(name, row) for name, row in summary["variants"].items() if name != summary.get("baseline")]
    blocks = ["\n".join(f"- {line}" for line in lines if line), LEGEND] if compared else []
    for one in shown:
        base = next(iter(one["texts"]))
        rows = (
            f"- **{name}**{'' if name == base else f', {parting(found)}'}: {_code(found['text'])}"
            for name, found in one["texts"].items()
        )
        blocks.append("\n".join([f"### {_code(one['prompt'])}", "", *rows]))
    if len(shown) < len(compared):
        blocks.append(f"{len(compared) - len(shown)} more prompts are in report/index.html.")
    return "\n\n".join(blocks)


def _code(text: str) -> str:
    """A text as inline code, with visible line breaks."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    shown = re.sub(r"\s*\n", " ↵ ", text).strip()
    return f"{fence} {shown} {fence}" if shown else "(nothing)"


def _beside(base: Values, ours: Values) -> dict[str, Any]:
    shared = _shared(base["ids"], ours["ids"])
    found: dict[str, Any] = {"text": ours["text"], "tokens": len(ours["ids"]), "shared": shared}
    lead = None
    if shared < len(ours["ids"]) and shared < len(base["ids"]):
        likely = dict(zip(base["best_ids"][shared], base["best_logprobs"][shared], strict=True))
        chosen, other = base["ids"][shared], ours["ids"][shared]
        if chosen in likely and other in likely:
            lead = abs(likely[chosen] - likely[other])  # rounding can put the baseline's own token second
    return {**found, "lead": lead, "near_tie": lead is not None and lead <= NEAR_TIE}


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements are equal from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _read(path: Path, stage: str) -> list[dict[str, Any]]:
    return read_lines(path, stage, "a text with its ids", lambda one: one.keys() >= _KEYS)
