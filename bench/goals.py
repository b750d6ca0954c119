"""The goals of our quantizer, checked against a benchmark result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.table import Row

FASTER = (  # ours (without the shared pass), theirs, speed-up
    ("awq, modelpress", "awq, autoawq, as published", 10.0),
    ("awq, modelpress", "awq, autoawq, mended", 4.0),
    ("gptq, modelpress", "gptq, llm-compressor", 3.0),
)
BETTER = (  # ours, theirs at the same settings
    ("int8, modelpress", "int8, llm-compressor"),
    ("gptq, modelpress", "gptq, llm-compressor"),
    ("awq, modelpress", "awq, autoawq, mended"),
)
TOGETHER = (  # our contenders for the demo's variants, sharing one pass, and the speed-up
    tuple(f"{name}, modelpress, as in params.yaml" for name in ("int8", "gptq", "awq")),
    5.0,
)
LIBRARIES = {  # the same with libraries, in sequence
    way: ("int8, llm-compressor", "gptq, llm-compressor", f"awq, autoawq, {way}") for way in ("as published", "mended")
}
SMALL = (4.5, 0.08)  # bits per weight, relative perplexity increase on every text
KEPT = (4.5, 0.97)  # bits per weight, retention
INT8 = ("int8, modelpress, as in params.yaml", 0.005)
DECODE = {  # against float32, in ONNX Runtime GenAI
    "int8, modelpress, as in params.yaml": 2.5,
    "awq, modelpress, as in params.yaml": 3.7,
}


@dataclass(frozen=True)
class Goal:
    """A goal: its subject, the measured figure, the promised one, and whether it is reached."""

    what: str
    found: str
    promised: str
    reached: bool


def goals(field: Sequence[Row], decode: Mapping[str, float]) -> list[Goal]:
    """The goals that apply to the contenders of a result. decode: speed of each relative to the baseline."""
    found = list(_goals({row.name: row for row in field}))
    for name, ratio in decode.items():
        about = f"{name}, decoding in ONNX Runtime GenAI against float32"
        found.append(Goal(about, f"{ratio:.2f}x", f"{DECODE[name]:g}x", ratio >= DECODE[name]))
    return found


def _goals(rows: Mapping[str, Row]) -> Iterator[Goal]:
    for ours, theirs, times in FASTER:
        if ours in rows and theirs in rows:
            ratio = rows[theirs].seconds / rows[ours].seconds
            yield Goal(f"{ours}, faster than {theirs}", f"{ratio:.1f}x", f"{times:g}x", ratio >= times)
    own, times = TOGETHER
    for way, other in LIBRARIES.items():
        if {*own, *other} <= set(rows):
            ratio = sum(rows[n].seconds for n in other) / (rows[own[0]].shared + sum(rows[n].seconds for n in own))
            about = f"int8, gptq and awq together, including the pass, against the libraries, autoawq {way}"
            yield Goal(about, f"{ratio:.1f}x", f"{times:g}x", ratio >= times)
    for ours, theirs in BETTER:
        if ours in rows and theirs in rows:
            for text, value in rows[ours].perplexity.items():
                most = rows[theirs].perplexity[text]
                yield Goal(f"{ours}, perplexity, {text}", f"{value:.2f}", f"at most {most:.2f}", value <= most)
    yield from _quality(rows)


def _quality(rows: Mapping[str, Row]) -> Iterator[Goal]:
    small = [row for row in rows.values() if row.own and row.bits_per_weight <= SMALL[0]]
    if small:
        best = min(small, key=lambda row: max(row.change.values()))
        for text, value in best.change.items():
            about = f"best of at most {SMALL[0]:g} bits ({best.name}), perplexity, {text}"
            yield Goal(about, f"{100 * value:+.1f}%", f"at most {100 * SMALL[1]:+g}%", value <= SMALL[1])
        if best.retention is not None:
            about = f"best of at most {KEPT[0]:g} bits ({best.name}), retention"
            yield Goal(about, f"{best.retention:.1%}", f"{KEPT[1]:.0%}", best.retention >= KEPT[1])
    name, most = INT8
    if name in rows:
        for text, value in rows[name].change.items():
            about = f"{name}, perplexity, {text}"
            yield Goal(about, f"{100 * value:+.2f}%", f"at most {100 * most:+g}%", value <= most)


def as_json(found: Sequence[Goal]) -> list[dict[str, Any]]:
    """The goals for the result file."""
    return [vars(goal) for goal in found]
