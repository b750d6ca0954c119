"""The load stage: size, load time, memory and speed of a variant in its target's runtime.

python -m tasks.load onnx int8
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tasks.benchmark import benchmark
from tasks.output import write_json
from tasks.program import arguments, run_stage
from tasks.settings import BASE, Settings


def main() -> None:
    """Measure the variant for the target that the command line names, in the current directory."""
    target, name = arguments("python -m tasks.load TARGET VARIANT")

    def work(settings: Settings) -> None:
        settings.variant(name)
        settings.check_target(target)
        exports = Path("exports") / target
        report = benchmark(name, settings.benchmark, target, exports / name, exports / BASE)
        write_json(Path(f"metrics/load/{target}/{name}.json"), asdict(report))
        speed = report.decode_tokens_per_second
        print(f"{name}: {report.size_bytes / 1e6:.1f} MB, {f'{speed:.1f} tokens/s' if speed else report.note}")

    run_stage(work)


if __name__ == "__main__":
    main()
