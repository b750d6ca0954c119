"""The HTML report: one file that opens offline, on a phone too, and follows the reader's light or dark mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tasks.reporting import completions, decision
from tasks.reporting.columns import columns, legend
from tasks.reporting.heat_map import HeatMap
from tasks.reporting.number_format import words
from tasks.reporting.overview import fastest, overview
from tasks.reporting.palette import DARK, LIGHT
from tasks.reporting.render import render
from tasks.reporting.served import engine, has_server, loaded, proof, ratios, under_load

WORST = 8  # layers shown per variant; the folded list has all of them
FIRST = 4  # prompts shown; the others are folded


def page(
    summary: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, float]],
    calibration: Mapping[str, Any],
    plots: Mapping[str, str],
    heats: Mapping[str, HeatMap],
    structure: Mapping[str, Any],
    latency: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Render the page.

    layers: each variant's relative error by layer; calibration: the quality report of the calibration data; plots: SVG
    of the plot, by the widths wide and narrow; heats: the heat map of each mixed-precision variant; structure: what was
    found in the decoder's layers, may be empty; latency: SVG of the plot of a load test, by width, empty without one.
    """
    rows = summary["variants"]
    return render(
        "report.html.j2",
        escape=True,
        summary=summary,
        rows=rows,
        baseline=rows[summary["baseline"]],
        judged={v: row for v, row in rows.items() if row["verdict"]},
        headline=decision.headline(summary),
        winner=decision.winner_line(summary),
        figures=decision.figures(summary),
        next_step=decision.next_step(summary),
        palettes={"light": LIGHT, "dark": DARK},
        table=columns(summary),
        legend=legend(summary),
        plots=plots,
        served={v: row["serving"] for v, row in rows.items()} if has_server(summary) else {},
        latency=latency,
        proof=proof,
        engine=engine,
        loads={
            v: {"figures": under_load(row["load"]), "ratios": ratios(row["load"])} for v, row in loaded(summary).items()
        },
        prompts=[_prompt(one, summary["baseline"]) for one in summary.get("completions") or []],
        first=FIRST,
        texts_legend=completions.LEGEND,
        heats=heats,
        layers={v: _worst(errors) for v, errors in layers.items() if errors},
        structure=structure,
        contract=flat({**summary["contract"], "hash": summary["contract_hash"], "gate": summary["gate"]}),
        calibration=flat(calibration),
        machine={key.replace("_gib", " (GiB)"): words(value) for key, value in summary["machine"].items()},
        versions={library: version for library, version in summary["versions"].items() if version},
    )


def overview_page(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Render the page of several targets, with a link to the page of each. summaries: by target."""
    return render(
        "overview.html.j2",
        escape=True,
        summary=next(iter(summaries.values())),
        summaries=summaries,
        decided={target: decision.winner_line(summary) for target, summary in summaries.items()},
        passing=[target for target, summary in summaries.items() if summary["winner"]],
        table=overview(summaries),
        fastest=fastest(summaries),
        palettes={"light": LIGHT, "dark": DARK},
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a nested JSON object to rows of text: {'overlap': {'boolq': 0}} -> {'overlap, boolq': '0'}."""
    rows: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping) and value:
            rows |= flat(value, f"{name}, ")
        elif isinstance(value, float):
            rows[name] = f"{value:,.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            rows[name] = f"{value:,}"
        else:
            rows[name] = words(value)
    return rows


def _prompt(one: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    """A prompt with its texts: name, where it parts, what it shares with the baseline's, the rest."""
    base = one["texts"][baseline]
    texts: list[Sequence[str]] = [(baseline, "baseline", base["text"].strip(), "")]
    for name, found in one["texts"].items():
        if name != baseline:
            shared, rest = completions.parts(base["text"].lstrip(), found["text"].strip())
            texts.append((name, completions.parting(found), shared, rest))
    return {"prompt": one["prompt"], "texts": texts}


def _worst(errors: Mapping[str, float]) -> dict[str, Any]:
    """All layers from worst to best, with bar lengths in percent of the worst layer's."""
    most = max(errors.values()) or 1.0
    order = sorted(errors.items(), key=lambda e: (-e[1], e[0]))
    rows = [(name.removeprefix("model."), error, round(100 * error / most, 1)) for name, error in order]
    return {"top": rows[:WORST], "all": rows}
