"""What a variant is made of: its inputs, its settings and the libraries that make it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.activations.store import IDENTITY
from tasks.errors import TaskError
from tasks.formats.gguf import llama_cpp
from tasks.output import MANIFEST
from tasks.settings.variant import BUILTIN, VariantSettings

if TYPE_CHECKING:
    from torch import Tensor

# Libraries that affect the result, by backend.
LIBRARIES = {
    BUILTIN: ("torch", "transformers", "compressed-tensors"),
    "llm-compressor": ("torch", "transformers", "llmcompressor", "compressed-tensors"),
    "autoawq": ("torch", "transformers", "autoawq"),
    "llama.cpp": ("gguf", llama_cpp.PACKAGE),
}


def identity_of(variant: VariantSettings, model: Path, calibration: Path, statistics: Path) -> str:
    """The identity of a variant that is made of these outputs of earlier stages; statistics count for our own quantizer
    alone."""
    return identity(variant, [model, calibration, *([statistics] if variant.is_ours else [])], versions(variant))


def identity(variant: VariantSettings, inputs: Sequence[Path], libraries: dict[str, str]) -> str:
    """sha256 of a variant's settings, its inputs' bytes and library versions. TaskError if an input is incomplete. Of
    statistics counts what does not depend on whether their Gram matrices are kept."""
    parts = [json.dumps(variant.model_dump(), sort_keys=True), json.dumps(libraries, sort_keys=True)]
    for folder in inputs:
        if not (folder / MANIFEST).exists():
            raise TaskError(f"{folder} is missing or incomplete; run the earlier stages: modelpress run")
        said = folder / IDENTITY if (folder / IDENTITY).exists() else folder / MANIFEST
        parts.append(said.read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def versions(variant: VariantSettings) -> dict[str, str]:
    """The versions of the libraries that affect the result."""
    names = () if variant.is_baseline else LIBRARIES[variant.backend]
    return {library: llama_cpp.version() if library == llama_cpp.PACKAGE else version(library) for library in names}


def read_tokens(variant: VariantSettings, calibration: Path) -> Tensor:
    """The calibration text that the variant is made with: int64 [samples, sequence_length]."""
    from safetensors.torch import load_file

    return load_file(calibration / "tokens.safetensors")["input_ids"][: variant.samples]
