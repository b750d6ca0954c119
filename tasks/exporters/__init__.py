"""Exporters from a quantized model to a target's files: one module per target, behind one protocol.

An exporter transcodes and never rounds: it only casts scales and splits blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tasks.errors import TaskError
from tasks.settings import TARGETS, Settings
from tasks.targets import files_of


class Exporter(Protocol):
    """The export stage's interface to a target."""

    def check(self, settings: Settings, model: Path | None) -> None:
        """TaskError before any work if the settings or the downloaded `model` cannot be exported."""

    def export(self, model: Path, destination: Path) -> None:
        """Write to the folder `destination` the runtime's replacements of files of `model`; the stage links all other
        files. TaskError if the runtime cannot load such a model."""


def check_group_sizes(settings: Settings, target: str, block: int, why: str) -> None:
    """TaskError naming the variant's key unless all group sizes are multiples of `block`; why: the reason."""
    for name, variant in settings.variants.items():
        for key, size in variant.group_sizes:
            if size % block:
                raise TaskError(
                    f"variants.{name}.{key} has groups of {size}, but {why}; "
                    f"sizes that fit the target {target}: {block} and its multiples"
                )


def load_exporter(target: str) -> Exporter:
    """Return the exporter of a target; TaskError if there is none."""
    match files_of(target):
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
