"""The targets `transformers` and `vllm`: the quantized model unchanged."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.errors import TaskError
from tasks.settings import Settings
from tasks.sources.known_types import known_type
from tasks.tensor_files import EMBEDDING, OUTPUT, TensorFiles


class TransformersExporter:
    """See the protocol `Exporter`."""

    def check(self, settings: Settings, model: Path | None) -> None:
        """See `Exporter`."""
        if model is not None and any(not variant.is_baseline for variant in settings.variants.values()):
            _check_engines(model)
        for name, variant in settings.variants.items():
            if variant.embedding:
                raise TaskError(
                    f"variants.{name}.embedding is {variant.embedding}, but Transformers and vLLM look up "
                    "embeddings in full precision; remove it, or set targets to [onnx] or [gguf]"
                )
            if variant.output_layer and model is not None and f"{OUTPUT}.weight" not in TensorFiles(model):
                raise TaskError(f"variants.{name}.output_layer is {variant.output_layer}, but {_TIED}")

    def export(self, model: Path, destination: Path) -> None:
        """See `Exporter`. Nothing is written: the stage links all files."""
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        quantized = {name.rpartition(".")[0] for name in TensorFiles(model) if not name.endswith((".weight", ".bias"))}
        if OUTPUT in quantized and config.get("tie_word_embeddings"):
            raise TaskError(f"the output layer of {model} is quantized, but {_TIED}")
        if EMBEDDING in quantized:
            raise TaskError(
                f"the embedding of {model} is quantized, but Transformers and vLLM look up embeddings in full "
                "precision; set targets to [onnx] or [gguf]"
            )


def _check_engines(model: Path) -> None:
    """TaskError if it is known that no engine reads the model's type when it is pressed."""
    kind = json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"]
    known = known_type(kind)
    if known and not known.engines:
        raise TaskError(
            f"no engine is known that reads a quantized {kind} model: tried were {known.tried} (docs/models.md); "
            "choose another model, or set targets to [gguf] or [onnx] if its runtime knows the type"
        )


_TIED = (
    "the model ties the output layer to the embedding, and Transformers and vLLM cannot separate them; "
    "leave output_layer out, or set targets to [onnx] or [gguf]"
)
