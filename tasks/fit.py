"""Whether settings fit a model, told from its config.json and the heads of its safetensors files alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.errors import TaskError
from tasks.settings import AwqSettings, GptqSettings, NoneSettings, Variant

# The families whose layers the methods know how to smooth and scale.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
GROUP_SIZES = (16, 32, 64, 128, 256)
PACKED = 32  # rows of a layer that AutoAWQ packs together


def check_fit(name: str, variant: Variant, model: Path) -> None:
    """TaskError if `variant` cannot be made of the model, naming the layer and the values that would fit."""
    if isinstance(variant, NoneSettings):
        return
    config = _json(model / "config.json")
    if config.get("model_type") not in ARCHITECTURES:
        raise TaskError(
            f"variants.{name}: the model is of type {config.get('model_type')!r}; supported: {', '.join(ARCHITECTURES)}"
        )
    layers = config["num_hidden_layers"]
    skipped = () if isinstance(variant, AwqSettings) else variant.skip_layers
    if beyond := [index for index in skipped if index >= layers]:
        raise TaskError(
            f"variants.{name}.skip_layers names layer {beyond[0]}, but the model has {layers}: 0 to {layers - 1}"
        )
    if len(set(skipped)) == layers:
        raise TaskError(f"variants.{name}.skip_layers names all {layers} layers, so nothing would be quantized")
    if isinstance(variant, GptqSettings | AwqSettings):
        inside = tuple(f".layers.{index}." for index in skipped)
        shapes = {n: shape for n, shape in linear_shapes(model).items() if not any(part in n for part in inside)}
        _check_groups(name, variant, shapes)
        _check_grid(name, variant, model)


def _check_groups(name: str, variant: GptqSettings | AwqSettings, shapes: Mapping[str, tuple[int, int]]) -> None:
    size = variant.group_size
    for layer, (rows, width) in shapes.items():
        if width % size:
            fitting = [g for g in GROUP_SIZES if all(w % g == 0 for _, w in shapes.values())]
            raise TaskError(
                f"variants.{name}.group_size is {size}, which does not divide the width {width} of {layer}; "
                f"sizes that divide every layer: {', '.join(map(str, fitting)) or 'none'}"
            )
        if isinstance(variant, AwqSettings) and rows % PACKED:
            raise TaskError(
                f"variants.{name}: {layer} has {rows} rows, and AutoAWQ packs {PACKED} at a time; "
                "use method gptq for this model"
            )


def _check_grid(name: str, variant: GptqSettings | AwqSettings, model: Path) -> None:
    """Weights that were once rounded to a grid lie on it: rounding to the same one again measures nothing."""
    source = model / "source.json"
    grid = _json(source).get("grid") if source.exists() else None
    if not grid or grid["bits"] != variant.bits:
        return
    symmetric = isinstance(variant, GptqSettings) and variant.symmetric
    # a finer grouping holds the coarser grid; an asymmetric grid holds a symmetric one
    if grid["group_size"] % variant.group_size == 0 and (not symmetric or grid["symmetric"]):
        raise TaskError(
            f"variants.{name}.group_size is {variant.group_size}, but the model was dequantized from 4-bit weights in "
            f"groups of {grid['group_size']}: the result would be exactly the baseline and prove nothing; "
            f"use a group_size above {grid['group_size']}, or a model in full precision"
        )


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """(rows, width) of every linear layer inside the decoder layers, by name, from the files' heads alone."""
    shapes = {}
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            head = json.loads(stream.read(length))
        for name, tensor in head.items():
            if ".layers." in name and name.endswith(".weight") and len(tensor["shape"]) == 2:
                shapes[name.removesuffix(".weight")] = (tensor["shape"][0], tensor["shape"][1])
    if not shapes:
        raise TaskError(f"{model} holds no decoder layers in safetensors files; run the download stage")
    return shapes


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
