"""What each linear layer of a model is to become under a variant's settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tasks.errors import TaskError
from tasks.formats import Format, Layout, load_format
from tasks.grid import Precision
from tasks.model.linears import linear_shapes
from tasks.schemes import Scheme, parse_precision
from tasks.settings import VariantSettings
from tasks.tensor_files import EMBEDDING, OUTPUT, TensorFiles

Shape = tuple[int, int]  # rows, width


def precision(form: Format, scheme: Scheme, scales: torch.dtype) -> Precision:
    """A scheme as the format stores it."""
    return Precision(form.grid(scheme, scales), scheme.symmetric_activations)


def scale_dtype(variant: VariantSettings, model: Path) -> torch.dtype:
    """Of scales, and of all that is not quantized."""
    own = getattr(torch, json.loads((model / "config.json").read_text(encoding="utf-8"))["dtype"])
    asked = None if variant.scale_dtype is None else getattr(torch, variant.scale_dtype)
    return load_format(variant.format).scale_dtype(own, asked)


def quantized_shapes(variant: VariantSettings, model: Path) -> dict[str, Shape]:
    """(rows, width) of the linear layers inside the decoder layers that are not skipped, by their whole names."""
    inside = tuple(f".layers.{index}." for index in variant.skip_layers)
    return {name: shape for name, shape in linear_shapes(model).items() if not any(part in name for part in inside)}


def asked_precision(variant: VariantSettings, model: Path) -> Precision:
    """Of all linear layers, whether its groups divide them or not."""
    return precision(load_format(variant.format), variant.precision, scale_dtype(variant, model))


def uniform_precisions(variant: VariantSettings, model: Path) -> dict[str, Precision]:
    """One scheme for all, in smaller groups where they must be."""
    asked = asked_precision(variant, model)
    return {
        name: replace(asked, grid=asked.grid.fitted(width))
        for name, (_, width) in quantized_shapes(variant, model).items()
    }


def candidate_precisions(variant: VariantSettings, model: Path) -> dict[str, Precision | None]:
    """Those of the scheme mixed by their labels; None: as it is."""
    form, scales = load_format(variant.format), scale_dtype(variant, model)
    return {label: precision(form, one, scales) if one else None for label, one in variant.precisions.items()}


def outer_precisions(variant: VariantSettings, model: Path) -> dict[str, Precision]:
    """Of the output layer and the embedding, by their names, in smaller groups where they must be."""
    asked = asked_outer_precisions(variant, model)
    shapes = outer_shapes(asked, model)
    return {name: replace(one, grid=one.grid.fitted(shapes[name][1])) for name, one in asked.items()}


def asked_outer_precisions(variant: VariantSettings, model: Path) -> dict[str, Precision]:
    """The same, whether their groups divide them or not. TaskError if the model ties what is set apart."""
    form, scales = load_format(variant.format), scale_dtype(variant, model)
    if variant.embedding and f"{OUTPUT}.weight" not in TensorFiles(model):
        raise TaskError(
            f"embedding is {variant.embedding}, but the model ties the embedding to the output layer; "
            "set output_layer alone, which is both's"
        )
    asked = {OUTPUT: variant.output_layer, EMBEDDING: variant.embedding}
    found = {name: parse_precision(text) for name, text in asked.items() if text}
    return {name: precision(form, one, scales) for name, one in found.items() if one}


def outer_shapes(precisions: Iterable[str], model: Path) -> dict[str, Shape]:
    """(rows, width) of the output layer and the embedding, of those that are named in `precisions`."""
    files = TensorFiles(model)
    names = [name for name in precisions if name in (OUTPUT, EMBEDDING)]
    sizes = {name: files.entry(f"{outer_tensor(name, files)}.weight").shape for name in names}
    return {name: (rows, width) for name, (rows, width) in sizes.items()}


def outer_tensor(name: str, files: TensorFiles) -> str:
    """The layer whose weight that of `name` is: the embedding's, for an output layer that is tied to it."""
    return name if f"{name}.weight" in files else EMBEDDING


def model_layout(variant: VariantSettings, model: Path, precisions: Mapping[str, Precision]) -> Layout:
    """All that is quantized, as the variant's format is to write it; precisions: of these layers, by their names."""
    return Layout(
        shapes=quantized_shapes(variant, model) | outer_shapes(precisions, model),
        precisions=precisions,
        skip_layers=variant.skip_layers,
        act_order=variant.rounding == "gptq" and variant.act_order == "static",
        damping=variant.damping_share,
    )


def bits_per_weight(precision: Precision | None, width: int, dtype: torch.dtype) -> float:
    """What a weight takes on disk; of a layer that stays as it is, in `dtype`."""
    return precision.grid.bits_per_weight(width) if precision else torch.finfo(dtype).bits
