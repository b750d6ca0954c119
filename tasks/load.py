"""The load stage: size, memory and speed of one variant; that of a target with a server under load, over HTTP.

python -m tasks.load vllm int8
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.benchmark import BenchmarkReport, benchmark, size_bytes
from tasks.environments import nvidia_gpu
from tasks.hardware import processor_name, stage_threads
from tasks.loadtest.figures import FIRST_TOKEN, PER_TOKEN, Load
from tasks.loadtest.measure import Measured, measure
from tasks.model.size import weight_bits
from tasks.output import write_json
from tasks.program import arguments, run_stage
from tasks.runtimes import RuntimeInfo
from tasks.serving.engines import ENGINES
from tasks.serving.process import NotServableHere, NotServed
from tasks.settings import BASE, Settings


@dataclass(frozen=True)
class LoadReport(BenchmarkReport):
    """metrics/load/TARGET/V.json: the benchmark's figures, and those of the load test.

    For a target with a server, the speeds come from the load test at its main concurrency, for one request: prompt
    tokens per second to the first token, and new tokens per second after it (medians); batch_size is that concurrency,
    repeats the number of pairs, load_seconds the time until the server answered. Ratios are those of the times, turned
    over: above 1 is faster than the baseline. command: of the server. load: None for a target without a server, and if
    the variant is not served; `note` says why.
    """

    command: list[str] | None
    load: Load | None


def load(name: str, target: str, settings: Settings, model: Path, baseline: Path, logs: Path) -> LoadReport:
    """Measure an exported variant beside the baseline: in its server under load, or, without one, in this process.

    logs: a folder for the output of servers and generator. A variant whose server does not start has no speeds, and a
    note. TaskError if the baseline's does not, or a server fails under load.
    """
    if target not in ENGINES:
        found = benchmark(name, settings.benchmark, target, model, baseline)
        return LoadReport(**{**vars(found), "command": None, "load": None})
    try:
        measured, note = measure(target, name, model, baseline, settings.load, logs), None
    except (NotServed, NotServableHere) as error:
        if name == BASE:
            raise
        measured, note = None, error.reason
    return _report(name, target, settings, model, measured, note)


def _report(
    name: str, target: str, settings: Settings, model: Path, measured: Measured | None, note: str | None
) -> LoadReport:
    asked = settings.load
    main = measured.load.main if measured else None
    prompt = measured.load.prompt_tokens if measured else asked.prompt_tokens
    runtime = RuntimeInfo(
        name=measured.engine if measured else ENGINES[target]().name,
        version=measured.version if measured else ENGINES[target]().version(),
        device="cuda" if nvidia_gpu() else "cpu",
        dtype=measured.dtype if measured else "auto",
        threads=stage_threads(),
        processor=processor_name(),
    )
    return LoadReport(
        variant=name,
        runtime=runtime,
        fast_kernel=measured is not None,
        note=note or (measured.load.comparison_note if measured else None),
        size_bytes=size_bytes(model),
        bits_per_weight=weight_bits(model),
        load_seconds=measured.start_seconds if measured else 0.0,
        peak_memory_bytes=measured.peak_memory_bytes if measured else 0,
        prompt_tokens=prompt,
        new_tokens=asked.new_tokens,
        batch_size=asked.concurrency,
        repeats=asked.pairs,
        prefill_tokens_per_second=prompt / main.time_to_first_token.p50 if main else None,
        decode_tokens_per_second=1 / main.time_per_token.p50 if main else None,
        time_to_first_token_seconds=main.time_to_first_token.p50 if main else None,
        prefill_ratio=_faster(name, measured, FIRST_TOKEN),
        decode_ratio=_faster(name, measured, PER_TOKEN),
        command=measured.command if measured else None,
        load=measured.load if measured else None,
    )


def _faster(name: str, measured: Measured | None, figure: str) -> float | None:
    """How many times as fast as the baseline, from the ratio of a time; 1 for the baseline itself."""
    if measured is None or measured.load.ratios is None:
        return 1.0 if measured and name == BASE else None
    return 1 / measured.load.ratios[figure].mean


def main() -> None:
    """Measure the variant for the target that the command line names, in the current directory."""
    target, name = arguments("python -m tasks.load TARGET VARIANT")

    def work(settings: Settings) -> None:
        settings.variant(name)
        settings.check_target(target)
        exports = Path("exports") / target
        logs = Path(".modelpress") / "logs" / f"load-{target}-{name}"
        report = load(name, target, settings, exports / name, exports / BASE, logs)
        write_json(Path(f"metrics/load/{target}/{name}.json"), asdict(report))
        print(f"{name}: {describe(report)}")

    run_stage(work)


def describe(report: LoadReport) -> str:
    """The report in one line."""
    size = f"{report.size_bytes / 1e6:.1f} MB"
    if report.load is None:
        speed = report.decode_tokens_per_second
        return f"{size}, {f'{speed:.1f} tokens/s' if speed else report.note}"
    main, ratios = report.load.main, report.load.ratios
    words = f"{size}, {main.tokens_per_second:.1f} tokens/s at {main.concurrency} requests at once"
    if ratios:
        found = ratios["tokens_per_second"]
        words += f", {found.mean:.2f} times the baseline's ({found.low:.2f} to {found.high:.2f}"
        words += ", a tie)" if found.tie else ")"
    failed = sum(one.failed for one in [main, *report.load.curve])
    return words + (f"; {failed} requests failed: {report.load.failures[0]}" if failed else "")


if __name__ == "__main__":
    main()
