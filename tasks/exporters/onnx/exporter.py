"""Checks and export for the target `onnx`."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.errors import TaskError
from tasks.exporters import check_group_sizes
from tasks.rope import rope_parameters
from tasks.settings import Settings

BLOCK = 16  # smallest number of weights that share a scale
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # supported by graph.py


class OnnxExporter:
    """See the protocol `Exporter`."""

    def check(self, settings: Settings, model: Path | None) -> None:
        """See `Exporter`."""
        check_group_sizes(settings, "onnx", BLOCK, f"ONNX Runtime has a scale for each {BLOCK}, 32 or 64 weights")
        if model is not None:
            check_family(model)

    def export(self, model: Path, destination: Path) -> None:
        """See `Exporter`."""
        from tasks.exporters.onnx.graph import export_onnx  # takes seconds to import

        check_family(model)
        export_onnx(model, destination)


def check_family(model: Path) -> None:
    """TaskError if the model's family or its rotary embedding is not supported."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    family = config.get("model_type")
    if family not in FAMILIES:
        raise TaskError(
            f"{model} is of type {family!r}, for which there is no ONNX export; supported: {', '.join(FAMILIES)}"
        )
    turns, turn = ("default", "llama3") if family == "llama" else ("default",), rope_parameters(config)["rope_type"]
    if turn not in turns:
        raise TaskError(
            f"{model} has rope_type {turn!r}, which ONNX Runtime GenAI's graph computes otherwise; supported for "
            f"{family}: {', '.join(turns)}; set targets to [transformers], or to [gguf] for linear"
        )
