"""Compare the variants with the baseline: table, Pareto plot, page and verdicts.

python -m tasks.report
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.output import whole_directory, write_json, write_text
from tasks.program import run_stage
from tasks.reporting.completions import markdown
from tasks.reporting.decision import decisive
from tasks.reporting.heat_map import heat_map
from tasks.reporting.html_page import page
from tasks.reporting.pareto_plot import pareto, pareto_svg
from tasks.reporting.provenance import machine, versions
from tasks.reporting.records import read_json
from tasks.reporting.summary import read_quantized, summarize
from tasks.reporting.table import table
from tasks.settings import Settings


@dataclass(frozen=True)
class Report:
    """What `report` found: the verdict of each variant, the winner's name or None, the figures that decide (for `dvc
    metrics diff`), and the table as text."""

    verdicts: dict[str, str]
    winner: str | None
    decisive: dict[str, Any]
    table: str


def report(settings: Settings, metrics: Path, results: Path, source: Path, destination: Path) -> Report:
    """Write summary.json, table.txt, pareto.png, completions.md and index.html to `destination`, all or none.

    Raises TaskError as `tasks.reporting.summary.summarize` does.
    """
    variants = list(settings.variants)
    summary: dict[str, Any] = {
        **summarize(variants, settings.gate, metrics, results, source),
        "machine": machine(),
        "versions": versions(),
    }
    pressed = {v: read_quantized(metrics, v) for v in variants}
    calibration = read_json(metrics / "calibrate.json", "calibrate")
    text = table(summary)
    with whole_directory(destination) as folder:
        write_json(folder / "summary.json", summary)
        write_text(folder / "table.txt", text)
        (folder / "pareto.png").write_bytes(pareto(summary))
        write_text(folder / "completions.md", markdown(summary) + "\n")
        layers = {v: found["layers"] for v, found in pressed.items()}
        plots = {"wide": pareto_svg(summary, narrow=False), "narrow": pareto_svg(summary, narrow=True)}
        heats = {v: heat for v, found in pressed.items() if (heat := heat_map(found["linears"]))}
        structure: dict[str, Any] = next(
            (found["structure"] for found in pressed.values() if found.get("structure")), {}
        )
        write_text(folder / "index.html", page(summary, layers, calibration, plots, heats, structure))
    verdicts = {v: row["verdict"] for v, row in summary["variants"].items() if row["verdict"]}
    return Report(verdicts, summary["winner"], decisive(summary), text)


def main() -> None:
    """Run the stage in the current folder, write the figures that decide to metrics/report.json and print the table."""

    def work(settings: Settings) -> None:
        source = Path("models/source/source.json")
        done = report(settings, Path("metrics"), Path("results"), source, Path("report"))
        write_json(Path("metrics/report.json"), done.decisive)
        print(done.table, end="")

    run_stage(work)


if __name__ == "__main__":
    main()
