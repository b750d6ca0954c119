"""The target `gguf`: one file for llama.cpp, with the quantized weights transcoded into its blocks.

Needs llama.cpp in its own environment (make gguf).
"""

from __future__ import annotations

import json
from pathlib import Path

from tasks.environments import is_made
from tasks.errors import TaskError
from tasks.exporters import check_group_sizes
from tasks.settings import Settings

BLOCK = 32  # weights that share a scale


class GgufExporter:
    """See the protocol `Exporter`."""

    def check(self, settings: Settings, model: Path | None) -> None:
        """See `Exporter`."""
        if not is_made("llama-cpp"):
            raise TaskError("targets has gguf, but llama.cpp is not compiled; compile it with: make gguf")
        check_group_sizes(settings, "gguf", BLOCK, f"GGUF has a scale for each {BLOCK} weights")
        if model is not None:
            _check_model(settings, model)

    def export(self, model: Path, destination: Path) -> None:
        """Write model.gguf and config.json; nothing if llama.cpp's quantizer already wrote the file. TaskError if
        llama.cpp does not support the model, its tokenizer or its weight types."""
        from tasks.formats.gguf.file import NAME, write_gguf
        from tasks.formats.gguf.llama_cpp import check_tokens

        file = model / NAME
        if not file.exists():
            write_gguf(model, destination)
            file = destination / NAME
        check_tokens(file, model)


def _check_model(settings: Settings, model: Path) -> None:
    from transformers import AutoTokenizer

    from tasks.formats.gguf.file import check_family
    from tasks.formats.gguf.vocabulary import rule_for_words
    from tasks.model.announced import announced

    check_family(json.loads((model / "config.json").read_text(encoding="utf-8")), str(model))
    rule_for_words(json.loads(AutoTokenizer.from_pretrained(model).backend_tokenizer.to_str()), model)
    if all(variant.is_baseline for variant in settings.variants.values()):
        return
    linears = {one.prefix + name: own for one in announced(model).layers for name, own in one.linears.items()}
    for layer, width in ((name, own.width) for name, own in linears.items()):
        if width % BLOCK:
            raise TaskError(
                f"the width of {layer} is {width}, but GGUF has a scale for each {BLOCK} weights: widths must be "
                f"multiples of {BLOCK}; use another target for this model"
            )
