"""Greedy texts against the baseline's, and the decision that every output begins with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import TaskError
from tasks.reporting.completions import NEAR_TIE, compare, count, markdown, parting, parts
from tasks.reporting.decision import figures, headline, next_step, shown_variant

Write = Callable[..., None]
BASE = {"ids": [5, 6, 7], "best_ids": [[5, 9], [6, 9], [7, 9]], "best_logprobs": [[-0.2, -2.0]] * 3}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a variant's texts: changes to the baseline's, for each text."""

    def write(name: str, *changes: dict[str, Any]) -> None:
        (tmp_path / name).mkdir()
        line: dict[str, Any] = {"prompt": "A", "prompt_ids": [1], "text": "a b c", **BASE}
        (tmp_path / name / "texts.jsonl").write_text("".join(json.dumps(line | change) + "\n" for change in changes))

    return write


def compared(tmp_path: Path) -> dict[str, Any]:
    (one,) = compare(tmp_path, ["int4", "base"], "base", "onnx")
    assert list(one["texts"]) == ["base", "int4"]
    return dict(one["texts"]["int4"])


@pytest.mark.parametrize(
    ("ids", "logprobs", "shared", "lead", "words"),
    [
        ([5, 6, 7], [-0.2, -2.0], 3, None, "the same text"),
        ([5, 9, 8], [-0.2, -2.0], 1, 1.8, "parts after 1 of 3 tokens, second choice (1.80 nats)"),
        ([5, 9, 8], [-0.7, -0.75], 1, 0.05, "parts after 1 of 3 tokens, a near-tie (0.05 nats)"),
        ([5, 8, 8], [-0.7, -0.75], 1, None, "parts after 1 of 3 tokens"),
        ([9, 8, 8], [-0.7, -0.75], 0, 0.05, "parts at once, a near-tie (0.05 nats)"),
        ([5, 6, 9, 3], [-0.75, -0.7], 2, 0.05, "parts after 2 of 4 tokens, a near-tie (0.05 nats)"),
    ],
)
def test_a_text_parts_where_its_token_is_not_the_baselines(
    tmp_path: Path, write: Write, ids: list[int], logprobs: list[float], shared: int, lead: float | None, words: str
) -> None:
    write("base", {"best_logprobs": [logprobs] * 3})
    write("int4", {"ids": ids})
    found = compared(tmp_path)
    assert (found["shared"], found["tokens"]) == (shared, len(ids))
    assert found["lead"] == (lead if lead is None else pytest.approx(lead))
    assert found["near_tie"] is (lead is not None and lead <= NEAR_TIE)
    assert parting(found) == words


def test_texts_near_ties_and_shared_tokens_are_counted(tmp_path: Path, write: Write) -> None:
    close = {"best_logprobs": [[-0.70, -0.75]] * 3}
    write("base", {}, close, {})
    write("int4", {}, {"ids": [5, 9, 1]}, {"ids": [9, 1]})
    found = compare(tmp_path, ["base", "int4"], "base", "onnx")
    assert count(found, "int4") == {"texts": 3, "same": 1, "near_ties": 1, "shared": 4 / 8}


def test_what_texts_share_is_told_from_the_rest() -> None:
    assert parts("one two", "one three") == ("one t", "hree")
    assert parts("one", "one two") == ("one", " two")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": [2]}, "texts.jsonl continues other prompts than base's; make both again: dvc repro"),
        ({"ids": None}, None),
    ],
)
def test_other_prompts_and_unreadable_texts_are_refused(
    tmp_path: Path, write: Write, change: dict[str, Any], message: str | None
) -> None:
    write("base", {})
    if message is None:
        (tmp_path / "int4").mkdir()
        (tmp_path / "int4/texts.jsonl").write_text('{"prompt": "A"}\n')
        message = "line 1 is not a text with its ids; make it again with: dvc repro -f evaluate@onnx-int4"
    else:
        write("int4", change)
    with pytest.raises(TaskError, match=re.escape(message)):
        compare(tmp_path, ["base", "int4"], "base", "onnx")


def test_missing_texts_are_refused(tmp_path: Path, write: Write) -> None:
    write("base", {})
    with pytest.raises(TaskError, match=r"int4/texts.jsonl not found; make it with: dvc repro evaluate@onnx-int4"):
        compare(tmp_path, ["base", "int4"], "base", "onnx")


def test_markdown_in_a_text_stays_text() -> None:
    texts = {name: {"text": "``` | <b>", "tokens": 1, "shared": 1} for name in ("base", "int4")}
    shown = markdown({"baseline": "base", "variants": {}, "completions": [{"prompt": "a`b", "texts": texts}]})
    assert "### `` a`b ``" in shown
    assert "- **int4**, the same text: ```` ``` | <b> ````" in shown
    assert markdown({"baseline": "base", "variants": {}}) == ""


def judged(verdict: str, mean: float, **more: Any) -> dict[str, Any]:
    kept = {"mean": mean, "low": mean - 0.02, "high": mean + 0.02, "at_least": mean - 0.01}
    return {"verdict": verdict, "retention": kept, "gate": 0.9, "size_bytes": 120_000_000, "ratio": 2.0, **more}


RUNTIME = {"name": "transformers", "version": "5.17.0", "device": "cpu"}
SLOW = {"fast_kernel": False, "runtime": RUNTIME}


def test_without_a_winner_the_closest_variant_is_shown() -> None:
    rows = {"base": {"size_bytes": 240_000_000}, "a": judged("fail", 0.8), "b": judged("fail", 0.85)}
    summary = {"baseline": "base", "winner": None, "variants": rows, "gate": {"confidence": 0.95}}
    assert headline(summary) == "No variant passes its gate"
    assert shown_variant(summary) == "b"
    shown = {one.label: (one.value, one.detail) for one in figures(summary)}
    assert shown["closest"][0] == "b"
    assert shown["size"] == ("120 MB", "2.00x smaller than the baseline's 240 MB")
    assert shown["retention"] == ("85.0%", "95% interval 83.0 to 87.0; gate 90%")


@pytest.mark.parametrize(
    ("winner", "row", "words"),
    [
        ("a", judged("pass", 0.98, speed={"fast_kernel": True}), "try a on your own tasks, then deploy"),
        ("a", judged("pass", 0.98, speed=SLOW), "measure a's speed in the engine that will serve it, because transfor"),
        (None, judged("inconclusive", 0.9, items_needed=1200), "set evaluation.limit to 1,200 items per task"),
        (None, judged("fail", 0.8), "give a variant more bits"),
    ],
)
def test_the_next_step_follows_from_the_verdict(winner: str | None, row: dict[str, Any], words: str) -> None:
    assert next_step({"winner": winner, "variants": {"base": {}, "a": row}}).startswith(f"Next: {words}")


def test_a_speed_is_given_with_its_engine() -> None:
    fast = {"fast_kernel": True, "runtime": RUNTIME, "decode_ratio": 1.5, "decode_tokens_per_second": 60.0}
    for speed, shown in (
        (fast, ("1.50x", "of the baseline's, 60.0 tokens/s in transformers 5.17.0 on cpu")),
        (SLOW, ("no figure", "transformers 5.17.0 on cpu has no fast kernel for its format")),
    ):
        row = judged("pass", 0.98, speed=speed)
        (found,) = (one for one in figures({"winner": "a", "variants": {"a": row}}) if one.label == "decode speed")
        assert (found.value, found.detail) == shown
