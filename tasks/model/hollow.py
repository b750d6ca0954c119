"""A model that is known by its shapes alone: its files without their numbers, and how large its variants will be."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from tasks.formats import load_format, packed_sizes
from tasks.model.announced import announced
from tasks.model.layout import (
    outer_precisions,
    outer_shapes,
    outer_tensor,
    quantized_shapes,
    scale_dtype,
    uniform_precisions,
)
from tasks.model.skeleton import skeleton
from tasks.output import write_json
from tasks.schemes import LLAMA_CPP, MIXED
from tasks.settings.variant import VariantSettings
from tasks.tensor_files import DTYPES, Entry, TensorFiles, joined_bytes, write_hollow

NAMES = {getattr(torch, name): short for name, short in DTYPES.items()}
NAMES |= {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64"}


def hollow_model(config: Any, dtype: str, directory: Path) -> Path:
    """Write the model of a Transformers configuration to `directory`, every tensor with its name and shape but without
    its numbers: what asks for shapes alone works on it, and it takes no disk."""
    from transformers.core_model_loading import revert_weight_conversion

    model = skeleton(config, getattr(torch, dtype), "cpu")
    stored = revert_weight_conversion(model, dict(model.named_parameters()))
    write_json(directory / "config.json", config.to_dict() | {"dtype": dtype})
    size = getattr(torch, dtype).itemsize
    entries = {
        name: Entry(DTYPES[dtype], tuple(tensor.shape), tensor.numel() * size) for name, tensor in stored.items()
    }
    write_hollow(directory / "model.safetensors", entries)
    return directory


def variant_bytes(variant: VariantSettings, model: Path) -> int:
    """The size of the safetensors files, bytes, that pressing `model` to the variant will write; its tensors' names and
    shapes are all that is asked of it.

    Exact for every scheme and format but two: mixed is taken to use its budget (with `retention` alone, its largest
    candidate), and llama.cpp's mixtures have half a bit a weight beside those of their name.
    """
    files = TensorFiles(model)
    entries = {name: files.entry(name) for name in files}
    if variant.is_baseline:
        return joined_bytes(entries)
    if variant.scheme in LLAMA_CPP:
        return round(sum(entry.count for entry in entries.values()) * (LLAMA_CPP[variant.scheme] + 0.5) / 8)
    form, dtype, mixed = load_format(variant.format), scale_dtype(variant, model), variant.scheme == MIXED
    inside, outer = quantized_shapes(variant, model), outer_precisions(variant, model)
    shapes = inside | outer_shapes(outer, model)
    solved = {f"{outer_tensor(name, files)}.weight" for name in outer}
    for layer in announced(model).layers:  # a tensor may stack several
        solved |= {layer.prefix + own.tensor for name, own in layer.linears.items() if layer.prefix + name in inside}
    found = {
        name: Entry(NAMES[dtype], entry.shape, entry.count * dtype.itemsize)
        for name, entry in entries.items()
        if name not in solved
    }
    sizes = lru_cache(maxsize=None)(partial(packed_sizes, form))  # a mixture has thousands of layers of one size
    for name, precision in (outer if mixed else outer | uniform_precisions(variant, model)).items():
        for end, (kind, shape) in sizes(precision, *shapes[name]).items():
            found[f"{name}.{end}"] = Entry(NAMES[kind], shape, math.prod(shape) * kind.itemsize)
    if not mixed:
        return joined_bytes(found)
    bits = variant.bits_per_weight or max((one.bits for one in variant.precisions.values() if one), default=16)
    return joined_bytes(found) + round(bits / 8 * sum(math.prod(shape) for shape in inside.values()))
