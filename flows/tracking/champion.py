"""Decide whether a new package replaces the champion, by a paired test over the items that both answered.

It does if it is *not worse* and *better in something*:

- It keeps at least the gate's share of the champion's score, with the gate's confidence. This is the test of the gate,
  with the champion as the baseline.
- It is smaller; or it has the same size (within 1%) and scores higher; or it is larger and scores higher with the
  gate's confidence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.errors import FlowError
from flows.workspace.git import git
from flows.workspace.outputs import fetch_output
from tasks.errors import TaskError
from tasks.reporting.verdict import judge, pair_items, retention, sequential_retention
from tasks.settings import GateSettings

SAME_SIZE = 0.01  # sizes that differ by less count as equal
# fields of the contract about the model, not about the questions: models may differ in the tokenizer
SUBJECT = frozenset({"tokenizer", "bos"})
# fields missing in earlier records, which contain all planned items, so that the order does not matter
LATER = frozenset({"order"})
_REMEDY = "to compare them, run the champion's settings again: modelpress run --set KEY=VALUE"


@dataclass(frozen=True)
class Contender:
    """An evaluated package. contract: of its evaluation; items: by task, each with its hash and score."""

    size_bytes: int
    contract: Mapping[str, Any]
    items: Mapping[str, list[dict[str, Any]]]


def read_contender(root: Path, target: str, variant: str) -> Contender:
    """Read the package of `variant` for `target` in the checkout `root`; FlowError if a metrics file is missing."""
    evaluated = _json(root / f"metrics/evaluate/{target}/{variant}.json")
    measured = _json(root / f"metrics/load/{target}/{variant}.json")
    return Contender(
        int(measured["size_bytes"]),
        evaluated["contract"],
        {
            path.stem.removeprefix("items-"): [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for path in sorted((root / "results" / target / variant).glob("items-*.jsonl"))
        },
    )


def fetch_contender(home: Path, tag: str, target: str, variant: str, folder: Path) -> Contender:
    """Fetch the package of the run `tag` from git and DVC's cache into `folder`; FlowError if it is missing."""
    for stage in ("evaluate", "load"):
        path = folder / f"metrics/{stage}/{target}/{variant}.json"
        path.parent.mkdir(parents=True)
        path.write_text(git(home, "show", f"{tag}:metrics/{stage}/{target}/{variant}.json"), encoding="utf-8")
    (folder / "results" / target).mkdir(parents=True)
    fetch_output(home, f"results/{target}/{variant}", tag, folder / "results" / target / variant)
    return read_contender(folder, target, variant)


def why_not(champion: Contender, new: Contender, gate: GateSettings, share: float) -> str | None:
    """The reason why `new` does not replace `champion`; None if it does. share: of the champion's score, to keep."""
    if differences := _differences(champion, new):
        return f"the two were not evaluated in the same way: {differences}; {_REMEDY}"
    ours, theirs = ({task: _asked(items) for task, items in one.items.items()} for one in (champion, new))
    both = {task: asked.keys() & theirs.get(task, {}).keys() for task, asked in ours.items()}
    if others := [t for t, ids in both.items() if not ids or any(ours[t][i] != theirs[t][i] for i in ids)]:
        return f"the two did not answer the same items of {', '.join(others)}; {_REMEDY}"
    try:
        pairs = {
            task: pair_items(task, "the new package", items, [i for i in new.items[task] if i["item"] in both[task]])
            for task, items in champion.items.items()
        }
        order = new.contract.get("order")
        if ours == theirs and (order is None or not gate.sequential):
            result = retention(pairs, gate.confidence, gate.resamples)
        else:
            # each stopped when its verdict was certain, so the common items are those of the earlier look
            result = sequential_retention(pairs, both, order, gate.confidence)
    except TaskError as error:
        return f"the two cannot be compared: {error}"
    verdict = judge(result, share)
    if verdict.verdict != "pass":
        return f"it is not certain to be as good: of the champion's score {verdict.reason}"
    larger = new.size_bytes / champion.size_bytes - 1
    if larger < -SAME_SIZE or (larger <= SAME_SIZE and result.mean > 1) or result.at_least > 1:
        return None
    score = f"{100 * result.mean:.1f}% of its score"
    if larger <= SAME_SIZE:
        return f"it is no smaller and not better ({score})"
    return f"it is {100 * larger:.0f}% larger and not certain to be better ({score})"


def _differences(champion: Contender, new: Contender) -> str:
    """The fields of the contract that differ, with both values."""
    ours, theirs = champion.contract, new.contract
    compared = (ours.keys() | theirs.keys()) - SUBJECT - (LATER - (ours.keys() & theirs.keys()))
    fields = [f for f in sorted(compared) if ours.get(f) != theirs.get(f)]
    return "; ".join(
        f"{f} was {_short(ours.get(f))} for the champion and is {_short(theirs.get(f))} now" for f in fields
    )


def _asked(items: list[dict[str, Any]]) -> dict[Any, Any]:
    return {item["item"]: item["hash"] for item in items}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise FlowError(f"{path} is missing; `dvc repro` creates it") from error
