"""The evaluate stage: measure a variant's quality against the baseline's, until the gate is decided.

python -m tasks.evaluate onnx int8

For base, it copies the results of the stage `reference`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np

from tasks.errors import TaskError
from tasks.hardware import peak_memory
from tasks.output import link_or_copy, whole_directory, write_json
from tasks.program import arguments, run_stage
from tasks.runtimes import Runtime, load_runtime
from tasks.scoring.completions import write_completions
from tasks.scoring.contract import contract_hash, same_contract
from tasks.scoring.divergence import Reference, TextScore, measure_text
from tasks.scoring.evaluation import (
    EvaluationReport,
    Job,
    Rows,
    Subject,
    TaskScore,
    read_reference,
    summary_line,
    write_items,
    write_text_rows,
)
from tasks.scoring.float16_range import within_float16
from tasks.scoring.reference_states import OutputLayer, States, output_layer, states_file
from tasks.scoring.sequential import bounds
from tasks.settings import BASE, GateSettings, Settings


def evaluate(
    name: str,
    job: Job,
    baseline: Path,
    reference: Path | None,
    gate: tuple[GateSettings, float] | None,
    destination: Path,
) -> EvaluationReport:
    """Measure a variant in the target's runtime and write its per-item results and greedy texts to `destination`.

    baseline: directory of the baseline model, for the divergence. reference: output of the stage `reference`; None:
    load the baseline instead. gate: the gate and the retention that it requires of this variant; None, or a gate that
    is not sequential: score all items.
    Raises TaskError if a task is unknown, its data cannot be read, a text is too short, the reference was evaluated
    under a different contract, or the model ships in float16 but computes numbers beyond it.
    """
    subject = Subject(job)
    if reference is not None:
        ours = {"contract": subject.contract, "contract_hash": contract_hash(subject.contract)}
        same_contract(job.target, name, read_reference(reference), ours)
    predictions = _Predictions(job, baseline, reference, subject.runtime.info.device)
    with whole_directory(destination) as work:
        write_completions(work, subject.completions())
        texts = {}
        with within_float16(subject.runtime, job.model):
            for text, windows in subject.windows():
                found, texts[text] = measure_text(subject.runtime.logprobs, predictions.of(text), windows, text)
                write_text_rows(work, text, found)
        if gate is None or not gate[0].sequential or reference is None:
            rows = subject.score_all()
        else:
            rows = subject.score_until(_decided(subject, *gate, reference))
        write_items(work, rows)
    return subject.report(name, rows, texts)


def _decided(subject: Subject, gate: GateSettings, share: float, reference: Path) -> Callable[[int, Rows], bool]:
    """Return a test for whether the verdict is certain after a look; same bounds as tasks/reporting/verdict.py."""
    theirs = {
        task: {row["item"]: row["score"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        for task in subject.order.items
        for path in [reference / f"items-{task}.jsonl"]
    }

    def decided(look: int, rows: Rows) -> bool:
        pairs = {
            task: np.array([(theirs[task][row["item"]], row["score"]) for row in found], np.float64).reshape(-1, 2)
            for task, found in rows.items()
        }
        found = bounds(pairs, subject.order.fractions(look), gate.confidence)
        return found.at_least >= share or found.at_most < share

    return decided


class _Predictions:
    """The baseline's predictions, computed from the reference's stored states if they exist, else by the baseline."""

    def __init__(self, job: Job, baseline: Path, reference: Path | None, device: str) -> None:
        self._job = job
        self._baseline = baseline
        self._reference = reference
        self._device = device

    def of(self, text: str) -> Reference:
        """The predictions for the windows of a text."""
        if self._reference is not None and (kept := states_file(self._reference, text)).exists():
            return States(kept, self._layer)
        return lambda window, ids: self._runtime.logprobs(ids)[0, :-1]

    @cached_property
    def _layer(self) -> OutputLayer:
        layer = output_layer(self._baseline, self._job.settings.dtype, self._device)
        if layer is None:
            raise TaskError(f"{self._baseline} has no output layer, but had one before; dvc repro -f reference")
        return layer

    @cached_property
    def _runtime(self) -> Runtime:
        return load_runtime(self._job.target, self._baseline, self._job.settings.dtype)


def hand_on(reference: Path, destination: Path) -> EvaluationReport:
    """Copy the results of the stage `reference` to `destination`; TaskError if there are none."""
    started = time.monotonic()
    report = read_reference(reference)
    with whole_directory(destination) as work:
        for path in sorted(reference.glob("*.jsonl")):
            link_or_copy(path, work / path.name)
    tasks = {task: TaskScore(**values) for task, values in report["tasks"].items()}
    texts = {text: TextScore(**values) for text, values in report["texts"].items()}
    costs = {"seconds": round(time.monotonic() - started, 1), "peak_memory_bytes": peak_memory("cpu")}
    return EvaluationReport(**{**report, "tasks": tasks, "texts": texts, **costs})


def main() -> None:
    """Evaluate the variant for the target that the command line names, in the current directory."""
    target, name = arguments("python -m tasks.evaluate TARGET VARIANT")

    def work(settings: Settings) -> None:
        variant = settings.variant(name)
        settings.check_target(target)
        exports, results, reference = (
            Path("exports") / target,
            Path("results") / target,
            Path("data/reference") / target,
        )
        if name == BASE:
            report = hand_on(reference, results / name)
        else:
            gate = settings.gate
            report = evaluate(
                name,
                Job(settings.evaluation, target, exports / name),
                exports / BASE,
                reference,
                (gate, gate.share(variant.bits)),
                results / name,
            )
        write_json(Path(f"metrics/evaluate/{target}/{name}.json"), asdict(report))
        print(summary_line(report))

    run_stage(work)


if __name__ == "__main__":
    main()
