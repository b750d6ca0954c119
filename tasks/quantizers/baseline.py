"""The baseline: links to the downloaded weights."""

from __future__ import annotations

from tasks.output import link_or_copy
from tasks.quantizers import QuantizeJob


def link_model(job: QuantizeJob) -> None:
    """Link the model's weights and configuration to `job.destination`."""
    for file in sorted(job.source.glob("*.safetensors*")):
        link_or_copy(file, job.destination / file.name)
    link_or_copy(job.source / "config.json", job.destination / "config.json")
