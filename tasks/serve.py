"""The serve stage: start a model in its target's real server, check it over HTTP, and compare it with the evaluation.

python -m tasks.serve vllm int8
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from tasks.deployment.tool_calling import read_template
from tasks.environments import nvidia_gpu
from tasks.errors import TaskError, first_line
from tasks.hardware import cpu_name, total_memory
from tasks.output import write_json
from tasks.program import arguments, run_stage
from tasks.rope import longest_context
from tasks.scoring.completions import Completion
from tasks.scoring.divergence import Window, text_windows
from tasks.serving.agreement import Agreement, agreement, read_completions, read_windows
from tasks.serving.api import BROKEN, Api
from tasks.serving.checks import CHECKS, Finding, Subject, check
from tasks.serving.engines import engine_of, served
from tasks.serving.near_ties import GAPS
from tasks.serving.process import NotServableHere, NotServed, Server
from tasks.serving.runtime import ServedRuntime, scores_through_server
from tasks.settings import BASE, EvaluationSettings, Settings
from tasks.targets import has_server

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 4096  # tokens at most, which bounds the KV cache
Records = tuple[list[Completion], dict[str, list[tuple[Window, float]]]]
LONGEST = 240  # characters of a reason
State = Literal["served", "not served", "not servable here", "no server"]


@dataclass(frozen=True)
class TaskItems:
    """Items of one task: their mean score through the server, and in the evaluation."""

    items: int
    score: float
    evaluated: float


@dataclass(frozen=True)
class ItemScores:
    """Items of lm-eval's tasks that were scored through the server, and how many scores equal the evaluation's."""

    scored: int
    equal: int
    tasks: dict[str, TaskItems]


@dataclass(frozen=True)
class ServeReport:
    """metrics/serve/TARGET/V.json.

    reason: why it was not served; None if it was. engine, version, command, start_seconds: of the server; None if it
    did not start. seconds: of the stage. findings: of the checks. agreement: with the evaluation. items: how many of
    lm-eval's items were scored through the server, and how many scores equal the evaluation's; None if it cannot score.
    """

    variant: str
    target: str
    state: State
    reason: str | None
    machine: dict[str, Any]
    engine: str | None = None
    version: str | None = None
    command: list[str] | None = None
    start_seconds: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float = 0.0
    findings: Sequence[Finding] = ()
    agreement: Agreement | None = None
    items: ItemScores | None = None


@dataclass(frozen=True)
class Evaluated:
    """What a variant is compared with. results: output of the stage `evaluate`; raw: the data; items: of each task that
    are scored through the server, None for all that the evaluation scored; evals: definitions of tasks."""

    results: Path
    raw: Path
    settings: EvaluationSettings
    items: int | None = None
    evals: Path = Path("evals")


def serve(name: str, target: str, model: Path, evaluated: Evaluated, log: Path) -> ServeReport:
    """Serve a model and check it. log: takes the server's output.

    A variant that is not served is reported as such. TaskError if the baseline is not served, if the engine cannot be
    installed, or if the evaluation's records are missing.
    """
    if not has_server(target):  # a model is tried in a process by the stage package
        return ServeReport(name, target, "no server", f"{target} is a library, no server", _machine())
    started = time.monotonic()
    report = _served(name, target, model, evaluated, log, started)
    if name == BASE and report.state == "not served":
        raise TaskError(f"the baseline is not served by {target}: {report.reason}; see {log}")
    return report


def _served(name: str, target: str, model: Path, evaluated: Evaluated, log: Path, started: float) -> ServeReport:
    from transformers import AutoTokenizer  # takes seconds to import

    def report(state: State, reason: str | None, **further: Any) -> ServeReport:
        seconds = round(time.monotonic() - started, 1)
        return ServeReport(name, target, state, reason, _machine(), seconds=seconds, **further)

    if not (model / "config.json").is_file():
        raise TaskError(f"{model} holds no model (no config.json); run its stage: modelpress run")
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    # before the server starts, which takes a minute
    records = _records(f"evaluate@{target}-{name}", tokenizer, evaluated)
    engine, context = engine_of(target), _context(model, evaluated.settings)
    try:
        with (
            served(target, model, name, "auto", log, context=context) as server,
            closing(Api(server.url, name, engine.offers, engine.running)) as api,
        ):
            facts = {
                "engine": server.engine,
                "version": server.version,
                "command": server.command,
                "start_seconds": server.start_seconds,
            }
            trial = _Trial(server, api, tokenizer, model, context, engine.computes_in(model, "auto"), evaluated)
            findings, same, problem = trial.checked(records)
            facts |= {"findings": findings, "agreement": same}
            try:
                facts["items"] = trial.items() if same else None
            except BROKEN as error:
                problem = f"scoring items through the server failed: {type(error).__name__}: {first_line(error)}"
            facts["peak_memory_bytes"] = server.peak_memory_bytes()
            ended = None if server.alive else f"the server ended; its last words: {server.last_words()}"
    except NotServed as error:
        return report("not served", str(error), engine=engine.name)
    except NotServableHere as error:
        return report("not servable here", str(error), engine=engine.name)
    failed = [f"{one.check}: {one.detail}" for one in findings if one.state == "failed"]
    reasons = [*filter(None, [ended, problem]), *failed, *(same.problems if same else [])]
    return report("not served" if reasons else "served", _short(reasons) if reasons else None, **facts)


def _short(reasons: Sequence[str]) -> str:
    """The first reason, and how many more there are; findings and agreement have them whole."""
    first = reasons[0] if len(reasons[0]) <= LONGEST else f"{reasons[0][: LONGEST - 3]}..."
    return first + (f" (and {len(reasons) - 1} more)" if reasons[1:] else "")


def _records(stage: str, tokenizer: PreTrainedTokenizerBase, evaluated: Evaluated) -> Records:
    """The evaluation's greedy texts, and its windows with their sums. stage: that made them."""
    settings = evaluated.settings
    windows = {
        text: text_windows(tokenizer, evaluated.raw, text, source, settings.text_tokens, settings.window)
        for text, source in settings.texts.items()
    }
    return read_completions(evaluated.results, stage), read_windows(evaluated.results, stage, windows)


@dataclass(frozen=True)
class _Trial:
    """A running server. context: the tokens that it takes; dtype: what it computes in (near_ties.py)."""

    server: Server
    api: Api
    tokenizer: PreTrainedTokenizerBase
    model: Path
    context: int
    dtype: str
    evaluated: Evaluated

    def checked(self, records: Records) -> tuple[list[Finding], Agreement | None, str | None]:
        """The findings, the agreement, and why there is none."""
        completions, windows = records
        subject = Subject(
            api=self.api,
            tokenizer=self.tokenizer,
            prompts=[one.prompt for one in completions],
            template=read_template(self.model),
            context=self.context,
            near=GAPS.get(self.dtype, max(GAPS.values())),
            date=date.today().isoformat(),
        )
        findings = []
        for one in CHECKS:
            findings.append(check(one, subject))
            print(f"{self.server.name}: {one}: {findings[-1].state}: {findings[-1].detail}", flush=True)
            if not self.server.alive:
                return findings, None, None
        kinds = self.dtype, self.evaluated.settings.dtype
        try:
            return findings, agreement(self.api, self.tokenizer, completions, subject.alone, windows, kinds), None
        except BROKEN as error:
            why = f"the comparison with the evaluation failed: {type(error).__name__}: {first_line(error)}"
            return findings, None, why

    def items(self) -> ItemScores | None:
        """The first items that the evaluation scored, scored by lm-eval through the server; None if it cannot."""
        evaluated, settings = self.evaluated, self.evaluated.settings
        rows = {
            path.stem.removeprefix("items-"): [
                json.loads(line) for line in path.read_text("utf-8").splitlines()[: evaluated.items]
            ]
            for path in sorted(evaluated.results.glob("items-*.jsonl"))
        }
        if not rows or not {"echo", "token ids"} <= self.api.offers:
            return None
        device = "cuda" if nvidia_gpu() else "cpu"
        runtime = ServedRuntime(self.server, self.api, self.tokenizer, device, self.dtype)
        asked = {task: [row["item"] for row in some] for task, some in rows.items()}
        scores = scores_through_server(runtime, settings, evaluated.evals, asked, self.context)
        pairs = {
            task: [(score, row["score"]) for row, score in zip(some, scores[task], strict=True)]
            for task, some in rows.items()
        }
        return ItemScores(
            scored=sum(map(len, pairs.values())),
            equal=sum(ours == theirs for some in pairs.values() for ours, theirs in some),
            tasks={
                task: TaskItems(len(some), *(round(sum(values) / len(some), 6) for values in zip(*some, strict=True)))
                for task, some in pairs.items()
            },
        )


def _context(model: Path, settings: EvaluationSettings) -> int:
    """The tokens that the server takes: enough for a window of the evaluation, and no more than the model reads."""
    longest = longest_context(json.loads((model / "config.json").read_text(encoding="utf-8")))
    wanted = max(CONTEXT, settings.window + 1)
    return min(longest, wanted) if longest else wanted


def _machine() -> dict[str, Any]:
    """The machine, without its name."""
    return {"processor": cpu_name(), "cores": psutil.cpu_count(logical=True), "memory_bytes": total_memory()}


def summary_line(report: ServeReport) -> str:
    """One line for the log."""
    if report.state != "served":
        return f"{report.variant}: {report.state}: {report.reason}"
    passed = sum(one.state == "passed" for one in report.findings)
    same = report.agreement
    words = f", {same.equal} of {same.texts} greedy texts equal and {same.near_ties} up to a near-tie" if same else ""
    loss = f", mean log-probability {same.difference:+.5f} nats" if same and same.difference is not None else ""
    return f"{report.variant}: served by {report.engine} {report.version}: {passed} checks passed{words}{loss}"


def main() -> None:
    """Serve the variant for the target that the command line names, in the current directory."""
    target, name = arguments("python -m tasks.serve TARGET VARIANT")

    def work(settings: Settings) -> None:
        settings.variant(name)
        settings.check_target(target)
        report = serve(
            name,
            target,
            Path("exports") / target / name,
            Evaluated(Path("results") / target / name, Path("data/raw"), settings.evaluation, settings.serve.items),
            Path(f".modelpress/logs/serve@{target}-{name}.server.log"),
        )
        write_json(Path(f"metrics/serve/{target}/{name}.json"), asdict(report))
        print(summary_line(report))

    run_stage(work)


if __name__ == "__main__":
    main()
