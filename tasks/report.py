"""Compare the variants with the baseline, for each target: table, Pareto plot, page and verdicts.

python -m tasks.report
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.output import whole_directory, write_json, write_text
from tasks.program import run_stage
from tasks.reporting.completions import markdown
from tasks.reporting.decision import decisive
from tasks.reporting.heat_map import heat_map
from tasks.reporting.html_page import overview_page, page
from tasks.reporting.latency_plot import Curve, latency, latency_svg
from tasks.reporting.pareto_plot import pareto, pareto_svg
from tasks.reporting.provenance import machine, versions
from tasks.reporting.records import read_json
from tasks.reporting.served import loaded
from tasks.reporting.summary import read_quantized, summarize
from tasks.reporting.table import tables
from tasks.settings import Settings


@dataclass(frozen=True)
class Report:
    """What `report` found: by target, the figures that decide (for `dvc metrics diff`); the tables as text."""

    decisive: dict[str, dict[str, Any]]
    table: str


def report(settings: Settings, metrics: Path, results: Path, source: Path, destination: Path) -> Report:
    """Write to `destination`, all or none: for each target, TARGET/summary.json, TARGET/completions.md and
    plots/TARGET.png, and plots/TARGET-latency.png of a load test; for all, table.txt and index.html, which with several
    targets links to TARGET/index.html.

    Raises TaskError as `tasks.reporting.summary.summarize` does.
    """
    variants = list(settings.variants)
    measured_on = {"machine": machine(), "versions": versions()}
    pressed = {v: read_quantized(metrics, v) for v in variants}
    calibration = read_json(metrics / "calibrate.json", "calibrate")
    summaries: dict[str, dict[str, Any]] = {
        target: {**summarize(target, variants, settings.gate, metrics, results, source), **measured_on}
        for target in settings.targets
    }
    text = tables(summaries)
    with whole_directory(destination) as folder:
        (folder / "plots").mkdir()
        for target, summary in summaries.items():
            (folder / target).mkdir()
            write_json(folder / target / "summary.json", summary)
            write_text(folder / target / "completions.md", markdown(summary) + "\n")
            (folder / "plots" / f"{target}.png").write_bytes(pareto(summary))
            if curves := _curves(summary):
                (folder / "plots" / f"{target}-latency.png").write_bytes(latency(curves))
            place = folder if len(summaries) == 1 else folder / target
            write_text(place / "index.html", _page(summary, pressed, calibration))
        if len(summaries) > 1:
            write_text(folder / "index.html", overview_page(summaries))
        write_text(folder / "table.txt", text)
    return Report({target: decisive(summary) for target, summary in summaries.items()}, text)


def _page(summary: Mapping[str, Any], pressed: Mapping[str, Any], calibration: Mapping[str, Any]) -> str:
    """The page of one target. pressed: quantize's metrics of each variant."""
    layers = {v: found["layers"] for v, found in pressed.items()}
    plots = {"wide": pareto_svg(summary, narrow=False), "narrow": pareto_svg(summary, narrow=True)}
    heats = {v: heat for v, found in pressed.items() if (heat := heat_map(found["linears"]))}
    structure: dict[str, Any] = next((found["structure"] for found in pressed.values() if found.get("structure")), {})
    curves = _curves(summary)
    under_load = (
        {"wide": latency_svg(curves, narrow=False), "narrow": latency_svg(curves, narrow=True)} if curves else {}
    )
    return page(summary, layers, calibration, plots, heats, structure, under_load)


def _curves(summary: Mapping[str, Any]) -> dict[str, Curve]:
    """For the plot: the baseline and each variant under rising load."""
    rows = loaded(summary)
    return {name: Curve(row["verdict"] or "baseline", row["load"]["curve"]) for name, row in rows.items()}


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
