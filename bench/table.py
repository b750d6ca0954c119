"""The bench's figures as rows, and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One contender. seconds: median of the pressing; shared: of the pass that all of our own share, 0 for others.

    bits_per_weight: scales and zero points counted. perplexity: by text, and its change against the baseline's. kl:
    nats a token, mean over the texts. retention: share of the baseline's mean score over the tasks; None: not measured.
    """

    name: str
    variant: str
    seconds: float
    shared: float
    peak_memory_bytes: int
    bits_per_weight: float
    perplexity: Mapping[str, float]
    change: Mapping[str, float]
    kl: float
    retention: float | None
    own: bool


def rows(found: Mapping[str, Any]) -> list[Row]:
    """The contenders of a result, in its order."""
    baseline = found["quality"]["base"]
    base = {text: score["perplexity"] for text, score in baseline["texts"].items()}
    made = []
    for name, variant in found["variants"].items():
        quality = found["quality"][name]
        scores = quality["texts"]
        made.append(
            Row(
                name=name,
                variant=variant,
                seconds=found["seconds"][name],
                shared=found["seconds"]["statistics"] if name in found["own"] else 0.0,
                peak_memory_bytes=found["peak_memory_bytes"][name],
                bits_per_weight=quality["bits_per_weight"],
                perplexity={text: score["perplexity"] for text, score in scores.items()},
                change={text: score["perplexity"] / base[text] - 1 for text, score in scores.items()},
                kl=sum(score["kl"] for score in scores.values()) / len(scores),
                retention=quality["score"] and quality["score"] / baseline["score"],
                own=name in found["own"],
            )
        )
    return made


def table(field: Sequence[Row]) -> Table:
    """For a terminal."""
    texts = list(field[0].perplexity)
    heads = ("contender", "seconds", "with the pass", "peak GB", "bits")
    shown = Table(*heads, box=None, header_style="bold", pad_edge=False)
    for text in texts:
        shown.add_column(f"perplexity, {text}", justify="right")
    shown.add_column("KL", justify="right")
    shown.add_column("retention", justify="right")
    for row in field:
        scores = [f"{row.perplexity[text]:.2f} {100 * row.change[text]:+.1f}%" for text in texts]
        together = f"{row.seconds + row.shared:.1f}" if row.shared else ""
        memory, bits = f"{row.peak_memory_bytes / 1e9:.1f}", f"{row.bits_per_weight:.2f}"
        kept = "" if row.retention is None else f"{row.retention:.1%}"
        shown.add_row(row.name, f"{row.seconds:.1f}", together, memory, bits, *scores, f"{row.kl:.3f}", kept)
    return shown
