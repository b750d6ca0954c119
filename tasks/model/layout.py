"""The precision of each linear layer of a model under a variant's settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tasks.errors import TaskError
from tasks.formats import Format, Layout, load_format
from tasks.grid import Precision
from tasks.model.announced import announced
from tasks.model.structure import read_structure
from tasks.schemes import Scheme, parse_precision
from tasks.settings.variant import VariantSettings
from tasks.tensor_files import EMBEDDING, OUTPUT, TensorFiles

Shape = tuple[int, int]  # rows, width


def precision(form: Format, scheme: Scheme, scales: torch.dtype) -> Precision:
    """The precision of a scheme in a format."""
    return Precision(form.grid(scheme, scales), scheme.symmetric_activations)


def scale_dtype(variant: VariantSettings, model: Path) -> torch.dtype:
    """The dtype of scales and unquantized tensors."""
    own = getattr(torch, json.loads((model / "config.json").read_text(encoding="utf-8"))["dtype"])
    asked = None if variant.scale_dtype is None else getattr(torch, variant.scale_dtype)
    return load_format(variant.format).scale_dtype(own, asked)


def linear_shapes(model: Path, statistics: Path | None = None) -> dict[str, Shape]:
    """(rows, width) of every linear layer that can be pressed, by full name. statistics: of the model, where there are
    some: what a pass has found in place of what the model's headers announce."""
    layers = announced(model).layers if statistics is None else read_structure(statistics)
    return {layer.prefix + name: (own.rows, own.width) for layer in layers for name, own in layer.linears.items()}


def layer_weights(model: Path) -> list[int]:
    """The number of weights in the linear layers of each decoder layer, as the model's headers announce them."""
    return [sum(own.rows * own.width for own in layer.linears.values()) for layer in announced(model).layers]


def quantized_shapes(variant: VariantSettings, model: Path, statistics: Path | None = None) -> dict[str, Shape]:
    """(rows, width) of the linear layers in decoder layers that are not skipped, by full name; see `linear_shapes`."""
    layers = announced(model).layers if statistics is None else read_structure(statistics)
    skipped = tuple(layers[index].prefix for index in variant.skip_layers)
    shapes = linear_shapes(model, statistics)
    return {name: shape for name, shape in shapes.items() if not (skipped and name.startswith(skipped))}


def asked_precision(variant: VariantSettings, model: Path) -> Precision:
    """The requested precision of all linear layers, even if its groups do not divide them."""
    return precision(load_format(variant.format), variant.precision, scale_dtype(variant, model))


def uniform_precisions(variant: VariantSettings, model: Path, statistics: Path | None = None) -> dict[str, Precision]:
    """The same scheme for all linear layers, with smaller groups where the width requires it."""
    asked = asked_precision(variant, model)
    return {
        name: replace(asked, grid=asked.grid.fitted(width))
        for name, (_, width) in quantized_shapes(variant, model, statistics).items()
    }


def candidate_precisions(variant: VariantSettings, model: Path) -> dict[str, Precision | None]:
    """The candidates of the scheme mixed by label; None: unquantized."""
    form, scales = load_format(variant.format), scale_dtype(variant, model)
    return {label: precision(form, one, scales) if one else None for label, one in variant.precisions.items()}


def outer_precisions(variant: VariantSettings, model: Path) -> dict[str, Precision]:
    """The precisions of the output layer and the embedding, with smaller groups where the width requires it."""
    asked = asked_outer_precisions(variant, model)
    shapes = outer_shapes(asked, model)
    return {name: replace(one, grid=one.grid.fitted(shapes[name][1])) for name, one in asked.items()}


def asked_outer_precisions(variant: VariantSettings, model: Path) -> dict[str, Precision]:
    """The requested ones, even if their groups do not divide the width. TaskError if the model ties the two and both
    are set."""
    form, scales = load_format(variant.format), scale_dtype(variant, model)
    if variant.embedding and f"{OUTPUT}.weight" not in TensorFiles(model):
        raise TaskError(
            f"embedding is {variant.embedding}, but the model ties the embedding to the output layer; "
            "set only output_layer, which applies to both"
        )
    asked = {OUTPUT: variant.output_layer, EMBEDDING: variant.embedding}
    found = {name: parse_precision(text) for name, text in asked.items() if text}
    return {name: precision(form, one, scales) for name, one in found.items() if one}


def outer_shapes(precisions: Iterable[str], model: Path) -> dict[str, Shape]:
    """(rows, width) of those of the output layer and the embedding that are in `precisions`."""
    files = TensorFiles(model)
    names = [name for name in precisions if name in (OUTPUT, EMBEDDING)]
    sizes = {name: files.entry(f"{outer_tensor(name, files)}.weight").shape for name in names}
    return {name: (rows, width) for name, (rows, width) in sizes.items()}


def outer_tensor(name: str, files: TensorFiles) -> str:
    """The layer that stores the weight of `name`: the embedding for a tied output layer."""
    return name if f"{name}.weight" in files else EMBEDDING


def model_layout(
    variant: VariantSettings, model: Path, precisions: Mapping[str, Precision], statistics: Path | None = None
) -> Layout:
    """The layout of the quantized model; precisions: of the quantized layers, by name."""
    return Layout(
        shapes=quantized_shapes(variant, model, statistics) | outer_shapes(precisions, model),
        precisions=precisions,
        act_order=variant.rounding == "gptq" and variant.act_order == "static",
        damping=variant.damping_share,
        others={name: own for name, own in announced(model).modules.items() if name != OUTPUT},
        skipped=_prefixes(variant, model),
    )


def _prefixes(variant: VariantSettings, model: Path) -> list[str]:
    """The prefixes of the skipped layers' tensors."""
    layers = announced(model).layers if variant.skip_layers else []
    return [layers[index].prefix for index in variant.skip_layers]


def bits_per_weight(precision: Precision | None, width: int, dtype: torch.dtype) -> float:
    """Bits per weight on disk; precision None: unquantized in `dtype`."""
    return precision.grid.bits_per_weight(width) if precision else torch.finfo(dtype).bits
