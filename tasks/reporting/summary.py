"""The results of all stages in one dictionary, the source of table, plot, page and model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.errors import TaskError
from tasks.old_words import new_record
from tasks.reporting.completions import compare, count
from tasks.reporting.labels import by_llama_cpp
from tasks.reporting.number_format import percent
from tasks.reporting.records import read_json, read_lines
from tasks.reporting.served import failed_to_serve, serving
from tasks.reporting.verdict import SEED, Retention, flips, judge, pair_items, retention, sequential_retention
from tasks.scoring.contract import same_contract
from tasks.scoring.sequential import Pairs
from tasks.settings import BASE, GateSettings

GGUF_BLOCK = 32  # weights that share a scale in llama.cpp's types
HOW = (
    "scheme",
    "recipe",
    "format",
    "backend",
    "bits",
    "output_layer",
)  # quantize's description of a variant
Items = Mapping[str, list[dict[str, Any]]]  # by task
FEW_ITEMS = 100  # with fewer items, a percentile interval is too narrow


def summarize(
    target: str, variants: list[str], gate: GateSettings, metrics: Path, results: Path, source: Path
) -> dict[str, Any]:
    """Compare every variant with the baseline in one target and name the winner, as plain JSON values.

    Reads `metrics`/quantize/<variant>.json, `metrics`/{evaluate,serve,load}/<target>/<variant>.json,
    `results`/<target>/<variant>/{items-<task>,texts}.jsonl and
    the model's `source` (source.json). Raises TaskError if a file is missing or unreadable, if two variants were
    evaluated under different contracts, or if items or prompts do not match.
    """
    quantized = {v: read_quantized(metrics, v) for v in variants}
    evaluated, served, measured = (
        {v: read_json(metrics / stage / target / f"{v}.json", f"{stage}@{target}-{v}") for v in variants}
        for stage in ("evaluate", "serve", "load")
    )
    for variant in variants:
        same_contract(target, variant, evaluated[BASE], evaluated[variant])
    model = read_json(source, "download")
    rows = {v: _measured(quantized[v], evaluated[v], measured[v], evaluated[BASE], measured[BASE]) for v in variants}
    baseline = _read_items(results / target, BASE, evaluated[BASE], target)
    chance = {task: values.get("chance") for task, values in evaluated[BASE]["tasks"].items()}
    for variant in variants:
        if variant != BASE:
            scored = _read_items(results / target, variant, evaluated[variant], target)
            pairs = {task: pair_items(task, variant, baseline[task], scored[task]) for task in baseline}
            found = _retention(f"{target}-{variant}", pairs, baseline, scored, gate, evaluated[BASE]["contract"])
            rows[variant] |= _judged(pairs, found, gate.share(quantized[variant]["bits"]), chance)
    for variant, row in rows.items():
        row["serving"] = serving(served[variant])
    completions = compare(results / target, variants, BASE, target)
    for variant, row in rows.items():
        row["completions"] = None if variant == BASE else count(completions, variant)
    return {
        "target": target,
        "model": {
            k: model.get(k) for k in ("source", "revision", "dequantized_from", "dtype", "parameters", "licence")
        },
        "contract": evaluated[BASE]["contract"],
        "contract_hash": evaluated[BASE]["contract_hash"],
        "gate": {**gate.model_dump(), "seed": SEED},
        "baseline": BASE,
        "variants": rows,
        "winner": winner(rows),
        "completions": completions,
        "notes": [*_notes(model, evaluated[BASE]), *_flattered(model, rows)],
    }


def winner(rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The smallest variant that passes and whose server serves it as it was evaluated, or that has no server here; on a
    tie, the one with the higher retention; None if there is none."""
    passing = [v for v, row in rows.items() if row["verdict"] == "pass" and not failed_to_serve(row)]
    return min(passing, key=lambda v: (rows[v]["size_bytes"], -rows[v]["retention"]["mean"], v), default=None)


def read_quantized(metrics: Path, variant: str) -> dict[str, Any]:
    """Quantize's metrics of a variant; TaskError as in `read_json`."""
    return new_record(read_json(metrics / "quantize" / f"{variant}.json", f"quantize@{variant}"))


def _measured(
    quantized: Mapping[str, Any],
    evaluated: Mapping[str, Any],
    measured: Mapping[str, Any],
    base_evaluated: Mapping[str, Any],
    base_measured: Mapping[str, Any],
) -> dict[str, Any]:
    """The row of one variant, without the values computed from its items."""
    if evaluated["texts"].keys() != base_evaluated["texts"].keys():
        raise TaskError(
            f"{evaluated['variant']} was measured on the texts {', '.join(evaluated['texts'])}, but base on "
            f"{', '.join(base_evaluated['texts'])}; evaluate both again"
        )
    texts = {
        text: {
            **values,
            "perplexity_change": values["perplexity"] / base_evaluated["texts"][text]["perplexity"] - 1,
        }
        for text, values in evaluated["texts"].items()
    }
    speeds = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_seconds")
    ratios = ("prefill_ratio", "decode_ratio")
    return {
        **{k: quantized[k] for k in (*HOW, "seconds", "identity", "tokens")},
        # of the exported file where the target's format states it; it can differ from the quantizer's figure
        "bits_per_weight": measured.get("bits_per_weight") or quantized["bits_per_weight"],
        "peak_memory_bytes": quantized["peak_memory_bytes"],
        "device": quantized["device"],
        "size_bytes": measured["size_bytes"],
        "ratio": base_measured["size_bytes"] / measured["size_bytes"],
        "speed": {
            **{k: measured[k] for k in ("fast_kernel", "note", "runtime", "load_seconds", *speeds, *ratios)},
            "peak_memory_bytes": measured["peak_memory_bytes"],
        },
        "load": measured.get("load"),
        "items": sum(values["items"] for values in evaluated["tasks"].values()),
        "task_items": {task: values["items"] for task, values in evaluated["tasks"].items()},
        "mean_score": evaluated["mean_score"],
        "scores": {task: values["score"] for task, values in evaluated["tasks"].items()},
        "texts": texts,
        "kl": sum(t["kl"] for t in texts.values()) / len(texts),
        "top1": sum(t["top1"] for t in texts.values()) / len(texts),
        **dict.fromkeys(("retention", "flips", "verdict", "reason", "items_needed", "gate")),
    }


def _retention(
    variant: str, pairs: Pairs, baseline: Items, scored: Items, gate: GateSettings, contract: Mapping[str, Any]
) -> Retention:
    """The retention with the bounds of the gate's method; TaskError if items are missing."""
    if gate.sequential:
        had = {task: [item["item"] for item in items] for task, items in scored.items()}
        return sequential_retention(pairs, had, contract.get("order"), gate.confidence)
    for task, items in baseline.items():
        if len(pairs[task]) < len(items):
            raise TaskError(
                f"task {task}: {variant} has results for {len(pairs[task])} of {len(items)} items, but gate.sequential "
                f"is false; evaluate the rest: dvc repro evaluate@{variant}"
            )
    return retention(pairs, gate.confidence, gate.resamples)


def _judged(pairs: Pairs, found: Retention, wanted: float, chance: Mapping[str, float | None]) -> dict[str, Any]:
    """The values computed from the items: retention, flips and verdict."""
    values = asdict(found)
    for task, row in values["tasks"].items():
        row |= {"chance": chance[task], **asdict(flips({task: pairs[task]}))}
    return {
        "retention": values,
        "flips": asdict(flips(pairs)),
        "gate": wanted,
        **asdict(judge(found, wanted)),
    }


def _read_items(
    results: Path, variant: str, evaluated: Mapping[str, Any], target: str
) -> dict[str, list[dict[str, Any]]]:
    """Read each task's items; TaskError if they do not match the variant's metrics."""
    items = {}
    for task, values in evaluated["tasks"].items():
        path = results / variant / f"items-{task}.jsonl"
        items[task] = read_lines(path, f"evaluate@{target}-{variant}", "an item with hash and score", _is_item)
        score = sum(i["score"] for i in items[task]) / max(1, len(items[task]))
        if len(items[task]) != values["items"] or not math.isclose(score, values["score"], abs_tol=1e-4):
            raise TaskError(
                f"{path} has {len(items[task])} items with mean score {score:.4f}, but {variant}'s metrics say "
                f"{values['items']} with {values['score']:.4f}; make both again: "
                f"dvc repro -f evaluate@{target}-{variant}"
            )
    return items


def _is_item(value: Mapping[str, Any]) -> bool:
    return {"item", "hash", "score"} <= value.keys() and isinstance(value["score"], int | float)


def _flattered(model: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A note on variants quantized by llama.cpp if the model was dequantized from GGUF: both use the same groups."""
    names = [name for name, row in rows.items() if by_llama_cpp(row)]
    if not names or (model.get("grid") or {}).get("group_size") != GGUF_BLOCK:
        return []
    return [
        f"{', '.join(names)}: llama.cpp's types share scales among {GGUF_BLOCK} weights, as did the "
        f"{model['dequantized_from']} weights that the baseline was dequantized from. The baseline's weights already "
        "lie close to such a grid, so the loss is smaller than for a full-precision model."
    ]


def _notes(model: Mapping[str, Any], evaluated: Mapping[str, Any]) -> list[str]:
    """Notes that readers need to judge the numbers."""
    notes = []
    if model.get("dequantized_from"):
        notes.append(
            f"The baseline was dequantized to {model['dtype']} from {model['dequantized_from']} weights, so it "
            "already has the loss of that earlier quantization. Retention is relative to this baseline, not to the "
            "original model."
        )
    for task, values in evaluated["tasks"].items():
        chance, items = values.get("chance"), values["items"]
        if chance and values["score"] < chance + 1.645 * math.sqrt(chance * (1 - chance) / items):
            notes.append(
                f"{task}: the baseline scores {percent(values['score'])}, not clearly above the "
                f"{percent(chance)} of guessing, so retention on this task says little about the model."
            )
        if items < FEW_ITEMS:
            notes.append(f"{task} has only {items} items: with fewer than {FEW_ITEMS}, the interval is not reliable.")
    return notes
