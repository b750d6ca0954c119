"""Whether a served model says what was evaluated: the evaluation's greedy texts, and its loss on given tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.reporting.records import read_lines
from tasks.scoring.completions import FILE, Completion
from tasks.scoring.divergence import Window
from tasks.serving.api import ID, Answer, Api
from tasks.serving.near_ties import GAPS, MEANS, Parting, parting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIVEN = 4096  # tokens at most, of all texts together


@dataclass(frozen=True)
class Agreement:
    """Served against evaluated.

    computed_in: by what the bounds are chosen (near_ties.py). texts: greedy texts; equal: of them, in all tokens;
    near_ties: of them, parted where rounding decides; parted: the others, in words. largest_gap: of a near-tie, nats.
    tokens: given ones; difference: of their mean log-probability, served minus evaluated, nats; by_text: the same for
    each held-out text; all None or empty if the server cannot tell. gap_bound, mean_bound: nats.
    """

    computed_in: str
    texts: int
    equal: int
    near_ties: int
    parted: list[str]
    largest_gap: float | None
    gap_bound: float
    tokens: int
    difference: float | None
    by_text: dict[str, float]
    mean_bound: float

    @property
    def problems(self) -> list[str]:
        """What contradicts the evaluation; empty if nothing does."""
        found = [f"greedy text {one}" for one in self.parted]
        if self.difference is not None and not abs(self.difference) <= self.mean_bound:
            found.append(
                f"the mean log-probability of {self.tokens} tokens differs by {self.difference:+.5f} nats from the "
                f"evaluation's; expected at most {self.mean_bound}"
            )
        return found


def agreement(
    api: Api,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Completion],
    answers: Sequence[Answer],
    windows: Mapping[str, Sequence[tuple[Window, float]]],
    computed_in: Sequence[str],
) -> Agreement:
    """Compare a server with the evaluation's records.

    answers: the served greedy texts after the prompts of `completions`, sent as texts. windows: by text, with the sum
    of the evaluated negative log-probabilities of the tokens after the first, nats.
    computed_in: of the server and of the evaluation; the coarser one decides the bounds.
    """
    bound = max(GAPS.get(one, max(GAPS.values())) for one in computed_in)
    found: list[Parting | None] = []
    parted: list[str] = []
    for number, (expected, answer) in enumerate(zip(completions, answers, strict=True), 1):
        if answer.prompt_ids is not None and answer.prompt_ids != expected.prompt_ids:
            found.append(None)
            parted.append(f"{number}: the server reads {answer.prompt_ids}; the evaluation read {expected.prompt_ids}")
            continue
        one = compared(expected, answer, tokenizer, bound)
        found.append(one)
        if one and not one.near_tie:
            parted.append(f"{number}, {one}: {answer.text!r} instead of {expected.text!r}")
    ties = [one for one in found if one and one.near_tie]
    sums = {text: _difference(api, some) for text, some in windows.items()} if "echo" in api.offers else {}
    tokens = sum(count for _, count in sums.values())
    return Agreement(
        computed_in=computed_in[0],
        texts=len(found),
        equal=len(found) - len(ties) - len(parted),
        near_ties=len(ties),
        parted=parted,
        largest_gap=max((one.gap for one in ties if one.gap is not None), default=None),
        gap_bound=bound,
        tokens=tokens,
        difference=sum(total for total, _ in sums.values()) / tokens if tokens else None,
        by_text={text: total / count for text, (total, count) in sums.items() if count},
        mean_bound=max(MEANS.get(one, max(MEANS.values())) for one in computed_in),
    )


def compared(expected: Completion, answer: Answer, tokenizer: PreTrainedTokenizerBase, bound: float) -> Parting | None:
    """Where an answer parts from the evaluation's text; by token ids, or by texts where the server tells no ids."""
    pairs = [list(zip(*place, strict=True)) for place in zip(expected.best_ids, expected.best_logprobs, strict=True)]
    if answer.ids is not None:
        found = parting(expected.ids, pairs, answer.ids, bound)
        if found and not found.near_tie and _near_for_server(expected, answer, found.place, bound):
            return replace(found, near_tie=True)
        return found
    if answer.text == expected.text:
        return None
    before = expected.prompt_ids

    def text(ids: Sequence[int]) -> str:
        whole, prompt = (tokenizer.decode(one, skip_special_tokens=True) for one in ([*before, *ids], before))
        return str(whole).removeprefix(str(prompt))

    for place, token in enumerate(expected.ids):
        if not answer.text.startswith(text(expected.ids[: place + 1])):
            likely = dict(pairs[place])
            other = next((one for one in likely if one != token), token)
            near = answer.text.startswith(text([*expected.ids[:place], other]))
            gap = abs(pairs[place][0][1] - pairs[place][1][1])
            return Parting(place, gap, near and gap < bound)
    return Parting(len(expected.ids), None, False)


def _near_for_server(expected: Completion, answer: Answer, place: int, bound: float) -> bool:
    """Whether both tokens are almost as likely as the best one for the server: the evaluation recorded two tokens only,
    and the served one can be the third."""
    if answer.ids is None or place >= min(len(expected.ids), len(answer.ids), len(answer.best or ())):
        return False
    likely = dict((answer.best or [])[place])
    tokens = [f"{ID}{ids[place]}" for ids in (expected.ids, answer.ids)]
    return all(token in likely and max(likely.values()) - likely[token] < bound for token in tokens)


def read_completions(results: Path, stage: str) -> list[Completion]:
    """The evaluation's greedy texts. TaskError that names the stage which makes them."""
    rows = read_lines(results / FILE, stage, "a greedy text", lambda row: set(row) == set(Completion.__annotations__))
    return [Completion(**row) for row in rows]


def read_windows(
    results: Path, stage: str, windows: Mapping[str, Sequence[Window]]
) -> dict[str, list[tuple[Window, float]]]:
    """The windows of each held-out text with what the evaluation found: the first of each, up to `GIVEN` tokens in all.

    TaskError if a record is missing, or is of other windows.
    """
    found = {}
    for text, some in windows.items():
        sizes = iter([len(window.ids) - 1 for window in some])
        rows = read_lines(
            results / f"windows-{text}.jsonl",
            stage,
            "of the window that the settings give",
            lambda row, sizes=sizes: row.get("tokens") == next(sizes, None) and isinstance(row.get("nll"), float),  # type: ignore[misc]
        )
        room = max(1, GIVEN // len(windows) // max(1, len(some[0].ids)))
        found[text] = [(window, row["nll"]) for window, row in zip(some, rows, strict=False)][:room]
    return found


def _difference(api: Api, windows: Sequence[tuple[Window, float]]) -> tuple[float, int]:
    """The sum of served minus evaluated log-probabilities, and the number of tokens."""
    total, tokens = 0.0, 0
    for window, nll in windows:
        values = api.given(window.ids)
        if len(values) != len(window.ids) - 1:
            raise ValueError(f"{len(values)} log-probabilities for {len(window.ids) - 1} given tokens")
        total += sum(values) + nll
        tokens += len(values)
    return total, tokens
