"""Score a loaded model on items and texts, and report the result; used by the stages `reference` and `evaluate`."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tasks.errors import TaskError
from tasks.output import checksums, code_hashes, write_text
from tasks.rope import longest_context
from tasks.runtimes import Runtime, load_runtime
from tasks.scoring.completions import Completion, complete, prompts
from tasks.scoring.contract import contract_hash, contract_of, libraries
from tasks.scoring.divergence import TextScore, Window, text_windows
from tasks.scoring.order import LOOKS, look_of
from tasks.scoring.score_cache import ScoreCache
from tasks.settings import EvaluationSettings
from tasks.text.end_tokens import end_tokens

REPORT = "evaluation.json"  # output of the stage `reference`: its report without COSTS, which differ from run to run
UNLIMITED = 1 << 20  # tokens, of a model that names no longest context
COSTS = ("seconds", "peak_memory_bytes")

Unit = Mapping[str, Sequence[int]]  # items that are scored together, by task
Rows = dict[str, list[dict[str, Any]]]  # by task: {"item", "hash", "score"} of each item, sorted by item


@dataclass(frozen=True)
class TaskScore:
    """A task's mean score over its scored items. chance: the score of guessing; None if an item has no options."""

    metric: str
    score: float
    items: int
    chance: float | None


@dataclass(frozen=True)
class EvaluationReport:
    """The content of metrics/evaluate/V.json. seconds: duration of the measurement; peak_memory_bytes: of the process.

    For base, both describe the copying of the results of the stage `reference`; that stage's own costs are in
    metrics/reference/base.json.
    """

    variant: str
    contract: dict[str, Any]
    contract_hash: str
    tasks: dict[str, TaskScore]
    mean_score: float
    texts: dict[str, TextScore]
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Job:
    """A model to measure in the runtime of `target`. raw: the data; evals: task definitions; scores: cache of earlier
    scores, shared by all workspaces of a checkout (flows/workspace/worktree.py)."""

    settings: EvaluationSettings
    target: str
    model: Path
    raw: Path = Path("data/raw")
    evals: Path = Path("evals")
    scores: Path = Path(".modelpress/scores")


@dataclass
class Subject:
    """A loaded model with its evaluation items, contract and score cache."""

    job: Job
    started: float = field(init=False)
    runtime: Runtime = field(init=False)

    def __post_init__(self) -> None:
        from tasks.scoring.lm_eval_adapter import RuntimeLM
        from tasks.scoring.questions import Questions

        job, settings = self.job, self.job.settings
        self.started = time.monotonic()
        self.runtime = load_runtime(job.target, job.model, settings.dtype)
        config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
        longest = longest_context(config) or UNLIMITED
        self._lm = RuntimeLM(self.runtime, settings.batch_tokens, longest, settings.chat_date)
        self._questions = Questions(self._lm, settings, job.evals)
        self.order = self._questions.order
        self.contract = contract_of(
            settings, self.runtime, job.model, job.raw, self._questions.definition(), self.order
        )
        self._cache = ScoreCache(job.scores, self._conditions())
        self._found: dict[str, dict[int, tuple[str, float]]] = defaultdict(dict)

    def score_all(self) -> Rows:
        """Score all planned items together."""
        self._score([{task: range(planned) for task, planned in self.order.items.items()}], "items")
        return self._rows()

    def score_blocks(self) -> Rows:
        """Score all planned items block by block, so that the cached scores stay valid when more items are planned."""
        self._score(self._questions.blocks(), "items")
        return self._rows()

    def score_until(self, enough: Callable[[int, Rows], bool]) -> Rows:
        """Score look after look until `enough(look, rows)` is true. look: counted from 1; rows: all rows so far."""
        seed = self.order.seed
        for look in range(1, LOOKS + 1):
            units = [
                {task: [i for i in items if look_of(task, i, seed) == look] for task, items in block.items()}
                for block in self._questions.blocks()
            ]
            self._score([{t: i for t, i in unit.items() if i} for unit in units], f"({look}/{LOOKS}) items")
            if enough(look, self._rows()):
                break
        return self._rows()

    def windows(self) -> Iterator[tuple[str, list[Window]]]:
        """The name and the windows of each held-out text."""
        settings = self.job.settings
        for text, source in settings.texts.items():
            yield (
                text,
                text_windows(self.runtime.tokenizer, self.job.raw, text, source, settings.text_tokens, settings.window),
            )

    def completions(self) -> list[Completion]:
        """The model's greedy texts. Ask for them first: a runtime that has scored may have to load its generator."""
        return complete(self.runtime, end_tokens(self.job.model, self.runtime.tokenizer), prompts())

    def report(self, variant: str, rows: Rows, texts: Mapping[str, TextScore]) -> EvaluationReport:
        """The report of an evaluation."""
        tasks = {
            task: TaskScore(
                self._found[task][found[0]["item"]][0],
                sum(row["score"] for row in found) / len(found),
                len(found),
                self._questions.chance(task),
            )
            for task, found in rows.items()
        }
        return EvaluationReport(
            variant=variant,
            contract=self.contract,
            contract_hash=contract_hash(self.contract),
            tasks=tasks,
            mean_score=sum(score.score for score in tasks.values()) / len(tasks),
            texts=dict(texts),
            seconds=round(time.monotonic() - self.started, 1),
            peak_memory_bytes=self.runtime.peak_memory_bytes,
        )

    def _score(self, units: Sequence[Unit], name: str) -> None:
        """Score each unit, or read its scores from the cache."""
        self._lm.progress = name if len(units) == 1 else ""
        total = sum(len(items) for unit in units for items in unit.values())
        with tqdm(total=total, desc=name, unit="item", disable=len(units) == 1) as bar:
            for unit in units:
                sizes = {task: len(items) for task, items in unit.items()}
                asked = self._questions.identity(unit)
                scores = self._cache.read(asked, sizes)
                if scores is None:
                    scores = self._questions.score(unit)
                    self._cache.write(asked, scores)
                for task, items in unit.items():
                    self._found[task] |= dict(zip(items, scores[task], strict=True))
                bar.update(sum(sizes.values()))

    def _rows(self) -> Rows:
        """Rows of all planned items that have been scored."""
        return {
            task: [
                {"item": i, "hash": self._questions.document_hash(task, i), "score": self._found[task][i][1]}
                for i in sorted(self._found[task])
                if i < planned
            ]
            for task, planned in self.order.items.items()
        }

    def _conditions(self) -> dict[str, Any]:
        """Everything that determines a score, except the items of the unit."""
        settings, info = self.job.settings, self.runtime.info
        return {
            "model": checksums(self.job.model),
            "engine": [info.name, info.version, info.device, info.dtype],
            "libraries": libraries(self.runtime),
            "batch_tokens": settings.batch_tokens,
            "shots": settings.shots,
            "chat_template": settings.chat_template,
            "seed": settings.seed,
            "evals": checksums(self.job.evals),
            "code": code_hashes(),
        }


def write_items(work: Path, rows: Rows) -> None:
    """Write items-TASK.jsonl for each task; TaskError if a task has no scored item."""
    for task, found in rows.items():
        if not found:
            raise TaskError(f"no item of task {task} was scored; raise evaluation.limit")
        write_text(work / f"items-{task}.jsonl", "".join(json.dumps(row) + "\n" for row in found))


def write_text_rows(work: Path, text: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write windows-TEXT.jsonl."""
    write_text(work / f"windows-{text}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def read_reference(reference: Path) -> dict[str, Any]:
    """Read the baseline's report from the output of the stage `reference`; TaskError if it cannot be read."""
    try:
        return dict(json.loads((reference / REPORT).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise TaskError(f"{reference / REPORT} cannot be read ({error}); make it with: dvc repro reference") from error


def summary_line(report: EvaluationReport) -> str:
    """One line for the log."""
    counts = sum(score.items for score in report.tasks.values())
    planned = sum(report.contract["order"]["items"].values())
    texts = ", ".join(f"perplexity on {text} {score.perplexity:.3f}" for text, score in report.texts.items())
    return f"{report.variant}: mean score {report.mean_score:.4f} on {counts} of {planned} items, {texts}"
