"""The error message for a stage that ran out of memory."""

from __future__ import annotations

from tasks.hardware import total_memory
from tasks.settings import BASE

_LOWER = {
    "quantize": "calibration.samples",
    "calibrate": "calibration.samples",
    "statistics": "calibration.samples",
    "reference": "evaluation.batch_tokens",
    "evaluate": "evaluation.batch_tokens",
    "load": "benchmark.batch_size",
}


def out_of_memory(stage: str, what: str, peak: int) -> str:
    """One line for a stage that ran out of memory. what: the event; peak: its peak memory in bytes."""
    kind = stage.partition("@")[0]
    # for the baseline, the stage only copies files
    setting = None if stage == f"quantize@{BASE}" else _LOWER.get(kind)
    lower = f"lower {setting} in params.yaml, or " if setting else ""
    return (
        f"{stage}: {what}; its peak was {peak / 1e9:.1f} GB of {total_memory() / 1e9:.1f} GB; "
        f"{lower}run one stage at a time (--jobs 1)"
    )
