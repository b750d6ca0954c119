"""From a pressed model to what a target's runtime loads: one module per target, behind one protocol.

An exporter transcodes and never rounds: casts of scales and splits of blocks are all that it does to a weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tasks.errors import TaskError
from tasks.settings import TARGETS, Settings


class Exporter(Protocol):
    """What the export stage asks of a target."""

    def check(self, settings: Settings, model: Path | None) -> None:
        """TaskError for what cannot be exported, before any work: by the settings, and by the downloaded `model`."""

    def export(self, model: Path, destination: Path) -> None:
        """Write to the folder `destination` what the runtime needs instead of the files of `model`; what is not
        written is linked by the stage. TaskError if the runtime cannot load such a model."""


def check_group_sizes(settings: Settings, block: int, why: str) -> None:
    """TaskError, naming the variant's key, unless all groups are multiples of `block` weights; why: they must be."""
    for name, variant in settings.variants.items():
        for key, size in variant.group_sizes:
            if size % block:
                raise TaskError(
                    f"variants.{name}.{key} has groups of {size}, but {why}; "
                    f"sizes that fit the target {settings.target}: {block} and its multiples"
                )


def load_exporter(target: str) -> Exporter:
    """The exporter of a target; TaskError if there is none."""
    match target:
        case "transformers":
            from tasks.exporters.transformers import TransformersExporter

            return TransformersExporter()
        case "onnx":
            from tasks.exporters.onnx.exporter import OnnxExporter

            return OnnxExporter()
        case "gguf":
            from tasks.exporters.gguf import GgufExporter

            return GgufExporter()
        case _:
            raise TaskError(f"no exporter for the target {target!r}; there are: {', '.join(TARGETS)}")
