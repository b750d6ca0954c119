"""The reference stage: measure the baseline's quality and store its last hidden states for later comparisons.

python -m tasks.reference onnx
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tasks.output import whole_directory, write_json
from tasks.program import arguments, run_stage
from tasks.runtimes import RuntimeWithStates
from tasks.scoring.completions import write_completions
from tasks.scoring.divergence import measure_text
from tasks.scoring.evaluation import (
    COSTS,
    REPORT,
    EvaluationReport,
    Job,
    Subject,
    summary_line,
    write_items,
    write_text_rows,
)
from tasks.scoring.reference_states import StateWriter, output_layer, states_file
from tasks.settings import BASE, Settings


def measure_reference(job: Job, destination: Path) -> EvaluationReport:
    """Evaluate the baseline on all planned items and write results, greedy texts, report and states to `destination`.

    States are stored only if the runtime exposes them and the output layer alone turns them into predictions.
    Raises TaskError if a task is unknown, its data cannot be read, or a text is too short.
    """
    subject = Subject(job)
    runtime = subject.runtime
    layer = None
    if isinstance(runtime, RuntimeWithStates):
        layer = output_layer(job.model, job.settings.dtype, runtime.info.device)
    with whole_directory(destination) as work:
        write_completions(work, subject.completions())
        rows = subject.score_blocks()
        write_items(work, rows)
        texts = {}
        for text, windows in subject.windows():
            if layer is not None and isinstance(runtime, RuntimeWithStates):
                writer = StateWriter(runtime, layer)
                found, texts[text] = measure_text(writer.logprobs, None, windows, text)
                writer.write(states_file(work, text))
            else:
                found, texts[text] = measure_text(runtime.logprobs, None, windows, text)
            write_text_rows(work, text, found)
        report = subject.report(BASE, rows, texts)
        # without seconds and memory: outputs must be the same in every run
        lasting = {key: value for key, value in asdict(report).items() if key not in COSTS}
        write_json(work / REPORT, lasting)
    return report


def main() -> None:
    """Measure the baseline for the target that the command line names, in the current directory."""
    (target,) = arguments("python -m tasks.reference TARGET")

    def work(settings: Settings) -> None:
        settings.check_target(target)
        job = Job(settings.evaluation, target, Path("exports") / target / BASE)
        report = measure_reference(job, Path("data/reference") / target)
        write_json(Path(f"metrics/reference/{target}/{BASE}.json"), {key: getattr(report, key) for key in COSTS})
        print(summary_line(report))

    run_stage(work)


if __name__ == "__main__":
    main()
