"""Whether settings fit a model, told from its config.json and the heads of its safetensors files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import TaskError
from tasks.model.family import ARCHITECTURES
from tasks.model.linears import linear_shapes
from tasks.settings import BUILTIN, AutoSettings, AwqSettings, GptqSettings, NoneSettings, Variant

if TYPE_CHECKING:
    from tasks.grid import Grid

GROUP_SIZES = (16, 32, 64, 128, 256)
PACKED = {"awq": 32, "gptq": 8}  # rows of a layer that these formats pack together
UNEVEN = "compressed-tensors"  # the format in which layers may differ
SMALLEST = 16  # a group size is halved until it divides a layer's width, but not below this


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
    skipped: list[int] = getattr(variant, "skip_layers", [])
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
        symmetric = isinstance(variant, GptqSettings) and variant.symmetric
        _check_grid(
            f"variants.{name}.group_size is {variant.group_size}", variant.bits, variant.group_size, symmetric, model
        )
    if isinstance(variant, AutoSettings):
        _check_candidates(name, variant, linear_shapes(model))
        for label, (bits, size) in zip(variant.candidates, variant.pairs, strict=True):
            _check_grid(f"variants.{name}.candidates holds {label}", bits, size, bits == 8, model)


def _check_groups(name: str, variant: GptqSettings | AwqSettings, shapes: Mapping[str, tuple[int, int]]) -> None:
    size = variant.group_size
    uneven = variant.backend == BUILTIN and variant.format == UNEVEN
    for layer, (rows, width) in shapes.items():
        if width % size and not (uneven and (_grid(variant.bits, size).fitted(width).group_size or 0) >= SMALLEST):
            fitting = [g for g in GROUP_SIZES if all(w % g == 0 for _, w in shapes.values())]
            advice = f"; or set format to {UNEVEN}, in which layers may differ" if variant.backend == BUILTIN else ""
            raise TaskError(
                f"variants.{name}.group_size is {size}, which does not divide the width {width} of {layer}; "
                f"sizes that divide every layer: {', '.join(map(str, fitting)) or 'none'}" + ("" if uneven else advice)
            )
        if rows % PACKED.get(variant.format, 1):
            raise TaskError(
                f"variants.{name}: {layer} has {rows} rows, and the format {variant.format} packs "
                f"{PACKED[variant.format]} at a time; use format {UNEVEN} for this model"
            )
    if variant.format == "gptq" and getattr(variant, "skip_layers", []):
        raise TaskError(
            f"variants.{name}.skip_layers is set, but the format gptq has no place for layers that are left alone; "
            f"use format {UNEVEN} or awq"
        )


def _check_candidates(name: str, variant: AutoSettings, shapes: Mapping[str, tuple[int, int]]) -> None:
    for layer, (_, width) in shapes.items():
        if all(width % size for _, size in variant.pairs):
            fitting = [g for g in GROUP_SIZES if width % g == 0]
            raise TaskError(
                f"variants.{name}.candidates are {', '.join(variant.candidates)}, none of which divides the width "
                f"{width} of {layer}; group sizes that do: {', '.join(map(str, fitting)) or 'none'}"
            )
    least = sum(
        rows * width * min(_grid(*pair).bits_per_weight(width) for pair in variant.pairs if width % pair[1] == 0)
        for rows, width in shapes.values()
    ) / sum(rows * width for rows, width in shapes.values())
    if variant.bits_per_weight is not None and variant.bits_per_weight < least:
        raise TaskError(
            f"variants.{name}.bits_per_weight is {variant.bits_per_weight:g}, but the smallest candidates take "
            f"{least:.3f}, scales and zero points counted; raise it, or add candidates with larger groups"
        )


def _grid(bits: int, size: int) -> Grid:
    import torch

    from tasks.grid import Grid

    return Grid(bits, size, symmetric=bits == 8, dtype=torch.float16)


def _check_grid(found: str, bits: int, size: int, symmetric: bool, model: Path) -> None:
    """Weights that were once rounded to a grid lie on it: rounding to the same one again measures nothing."""
    source = model / "source.json"
    grid = _json(source).get("grid") if source.exists() else None
    if not grid or grid["bits"] != bits:
        return
    # a finer grouping holds the coarser grid; an asymmetric grid holds a symmetric one
    if grid["group_size"] % size == 0 and (not symmetric or grid["symmetric"]):
        raise TaskError(
            f"{found}, but the model was dequantized from {bits}-bit weights in "
            f"groups of {grid['group_size']}: the result would be exactly the baseline and prove nothing; "
            f"use a group size above {grid['group_size']}, or a model in full precision"
        )


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
