"""Check settings against a model, from its config.json and safetensors headers only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tasks.errors import TaskError
from tasks.formats import GROUP_SIZES, check_groups, load_format
from tasks.model.announced import announced
from tasks.model.layout import (
    asked_outer_precisions,
    asked_precision,
    bits_per_weight,
    candidate_precisions,
    model_layout,
    quantized_shapes,
)
from tasks.rope import longest_context
from tasks.schemes import LLAMA_CPP, MIXED, Scheme, precision_label
from tasks.settings import Settings
from tasks.settings.variant import BUILTIN, VariantSettings


def check_fit(name: str, variant: VariantSettings, model: Path) -> None:
    """TaskError naming the layer and the valid values if `variant` does not fit the model."""
    if variant.is_baseline:
        return
    layers = len(announced(model).layers)
    if beyond := [index for index in variant.skip_layers if index >= layers]:
        raise TaskError(
            f"variants.{name}.skip_layers names layer {beyond[0]}, but the model has {layers}: 0 to {layers - 1}"
        )
    if len(set(variant.skip_layers)) == layers:
        raise TaskError(f"variants.{name}.skip_layers names all {layers} layers, so nothing would be quantized")
    if variant.scheme in LLAMA_CPP:
        return
    unusual = next((one.prefix + name for one in announced(model).layers for name in one.unusual), None)
    if unusual and (variant.backend != BUILTIN or variant.format != "compressed-tensors"):
        what, remedy = ("backend", BUILTIN) if variant.backend != BUILTIN else ("format", "compressed-tensors")
        raise TaskError(
            f"variants.{name}.{what} is {getattr(variant, what)}, which does not hold {unusual}, a matrix that is no "
            f"module of its own (an expert, or a transposed one); set {what} to {remedy}"
        )
    check = _check_candidates if variant.scheme == MIXED else _check_format
    try:
        check(variant, model)
    except TaskError as error:
        raise TaskError(f"variants.{name}: {error}") from error
    if variant.scheme == MIXED:
        for label, scheme in variant.precisions.items():
            if scheme:
                _check_grid(f"variants.{name}.candidates holds {label}", scheme, model)
    else:
        _check_grid(f"variants.{name} is {precision_label(variant.precision)}", variant.precision, model)


def check_context(settings: Settings, config: Mapping[str, Any]) -> None:
    """TaskError naming the setting that asks for more tokens in a row than the model was made for.

    config: the model's config.json. A model that names no longest context has none.
    """
    longest = longest_context(config)
    if longest is None:
        return
    benchmark = settings.benchmark
    asked = {
        "calibration.sequence_length is": settings.calibration.sequence_length,
        "evaluation.window is": settings.evaluation.window,
        "benchmark.prompt_tokens and new_tokens are together": benchmark.prompt_tokens + benchmark.new_tokens,
    }
    for what, tokens in asked.items():
        if tokens > longest:
            raise TaskError(f"{what} {tokens}, but the model's context is {longest:g} tokens; lower it to at most that")


def _check_format(variant: VariantSettings, model: Path) -> None:
    """TaskError if the variant's format or library does not support it."""
    asked = dict.fromkeys(quantized_shapes(variant, model), asked_precision(variant, model))
    layout = model_layout(variant, model, asked | asked_outer_precisions(variant, model))
    load_format(variant.format).check(layout)
    if variant.backend != BUILTIN:
        check_groups(layout)  # libraries do not reduce the group size for a layer


def _check_candidates(variant: VariantSettings, model: Path) -> None:
    load_format(variant.format).check(model_layout(variant, model, asked_outer_precisions(variant, model)))
    shapes = quantized_shapes(variant, model)
    candidates = candidate_precisions(variant, model)
    dtype = getattr(torch, _json(model / "config.json")["dtype"])
    least = 0.0
    for layer, (rows, width) in shapes.items():
        fitting = [one for one in candidates.values() if one is None or one.grid.fitted(width) == one.grid]
        if not fitting:
            sizes = [g for g in GROUP_SIZES if width % g == 0]
            raise TaskError(
                f"candidates are {', '.join(candidates)}, none of which divides the width {width} of {layer}; "
                f"group sizes that do: {', '.join(map(str, sizes)) or 'none'}"
            )
        least += rows * width * min(bits_per_weight(one, width, dtype) for one in fitting)
    least /= sum(rows * width for rows, width in shapes.values())
    if variant.bits_per_weight is not None and variant.bits_per_weight < least:
        raise TaskError(
            f"bits_per_weight is {variant.bits_per_weight:g}, but the smallest candidates take "
            f"{least:.3f}, scales and zero points counted; raise it, or add candidates with larger groups"
        )


def _check_grid(found: str, scheme: Scheme, model: Path) -> None:
    """Refuse a grid that the model's weights already lie on: rounding to it again changes nothing."""
    source = model / "source.json"
    grid = _json(source).get("grid") if source.exists() else None
    if not grid or grid["bits"] != scheme.bits or scheme.group_size is None:
        return
    # smaller groups contain the grid of larger ones; an asymmetric grid contains the symmetric one
    if grid["group_size"] % scheme.group_size == 0 and (not scheme.symmetric or grid["symmetric"]):
        raise TaskError(
            f"{found}, but the model was dequantized from {scheme.bits}-bit weights in "
            f"groups of {grid['group_size']}: the result would equal the baseline; "
            f"use a group size above {grid['group_size']}, or a model in full precision"
        )


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
