"""The export stage: convert a variant for the target's runtime.

The transformers runtime loads the quantize stage's files, so its export links them. For other targets tasks/exporters/
writes weights and configuration, and other files are linked.

    python -m tasks.export onnx int8
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.errors import TaskError
from tasks.exporters import load_exporter
from tasks.output import MANIFEST, link_or_copy, whole_directory
from tasks.program import arguments, run_stage
from tasks.settings import Settings


@dataclass(frozen=True)
class ExportReport:
    """The number of files of the export and their size in bytes."""

    files: int
    bytes: int


def export(model: Path, target: str, destination: Path) -> ExportReport:
    """Export the model for `target`; TaskError if the model is missing or the target is unknown."""
    exporter = load_exporter(target)
    if not (model / MANIFEST).exists():
        raise TaskError(f"{model} is missing or incomplete; run the quantize stage first: modelpress run")
    with whole_directory(destination) as work:
        exporter.export(model, work)
        files = sorted(p for p in model.rglob("*") if p.is_file() and p.name != MANIFEST)
        if any(work.iterdir()):  # the exporter replaces the weights
            files = [p for p in files if not p.match("*.safetensors*") and not (work / p.relative_to(model)).exists()]
        for file in files:
            link_or_copy(file, work / file.relative_to(model))
        sizes = [p.stat().st_size for p in work.rglob("*") if p.is_file()]
    return ExportReport(len(sizes), sum(sizes))


def main() -> None:
    """Export the variant for the target that the command line names, in the current directory."""
    target, name = arguments("python -m tasks.export TARGET VARIANT")

    def work(settings: Settings) -> None:
        settings.variant(name)
        settings.check_target(target)
        report = export(Path("models") / name, target, Path("exports") / target / name)
        print(f"{name}: {report.files} files, {report.bytes / 1e6:.1f} MB for {target}")

    run_stage(work)


if __name__ == "__main__":
    main()
