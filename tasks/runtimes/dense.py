"""Load a quantized model as a dense one: exactly dequantized weights, and quantized activations.

Our own reader, for what Transformers does not load without a GPU library (AutoAWQ's and AutoGPTQ's formats), or not as
it was written: mixtures of experts, whose skipped layers it would fill with random numbers, and models whose names or
shapes on disk are not those in memory.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from tasks.activation_rounding import round_inputs
from tasks.errors import TaskError
from tasks.formats.stored import StoredModel
from tasks.model.linears import join
from tasks.model.names import Names, in_own_storage
from tasks.model.products import Slice
from tasks.model.rounding import rounded_products
from tasks.model.skeleton import find_layers, place, skeleton, ties_output
from tasks.model.stored_places import FILE, read_places
from tasks.tensor_files import EMBEDDING, OUTPUT


def needs_own_reader(directory: Path, method: str) -> bool:
    """Whether Transformers does not load the quantized model as it was written. method: its format."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from tasks.formats import load_format

    if not load_format(method).native or (directory / FILE).exists():
        return True
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kinds = {config.get("model_type"), (config.get("text_config") or {}).get("model_type")}
    return any(get_checkpoint_conversion_mapping(kind) for kind in kinds) or _renamed(directory)


def _renamed(directory: Path) -> bool:
    """Whether tensors have other names in memory: then Transformers leaves quantized models in the dtype on disk."""
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    stored = StoredModel(directory)
    names = [*stored.dense, *(f"{name}.weight" for name in stored.quantized)]
    found = Names(skeleton(config, torch.float32, "cpu"), names)
    return any(target != name for name, target in found.target.items() if name not in found.strangers)


def load_dense(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the quantized model in `directory` as a dense one; TaskError if the tensors do not match its config."""
    stored = StoredModel(directory)
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    dense = {name: stored.tensor(name) for name in stored.dense}
    rounding = {}
    for name in stored.quantized:
        linear = stored.linear(name)
        dense[f"{name}.weight"] = linear.weight.weight().to(dtype)
        if linear.precision.symmetric_activations is not None:
            rounding[name] = linear.precision.symmetric_activations
    if ties_output(config) and OUTPUT in stored.quantized:  # also the embedding's weight
        dense[f"{EMBEDDING}.weight"] = dense[f"{OUTPUT}.weight"]
    dense = join(dense, read_places(directory))
    model = skeleton(config, dtype, "cpu")
    shapes = {name: tuple(tensor.shape) for name, tensor in dense.items()}
    names = Names(model, dense)
    _fill(model, names, dense, dtype, directory)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(directory)
    _round(model, names, shapes, rounding)
    found: PreTrainedModel = model
    return found


def _fill(model: Any, names: Names, dense: dict[str, torch.Tensor], dtype: torch.dtype, directory: Path) -> None:
    """Put the tensors in their places; `dense` is empty afterwards."""
    values = names.values(dense, model.state_dict())
    unexpected = sorted({*names.strangers} - {*names.ignored(names.strangers, missing=False)})
    dense.clear()
    missing = names.nowhere(model.state_dict(), values)
    for name, tensor in values.items():
        place(model, name, in_own_storage(tensor.to(dtype if tensor.is_floating_point() else tensor.dtype)))
    if missing or unexpected:
        raise TaskError(
            f"{directory} does not fit its config.json: missing {missing[:3]}, unexpected {unexpected[:3]}; "
            "rebuild it: modelpress run"
        )
    model.tie_weights()


def _round(model: Any, names: Names, shapes: dict[str, tuple[int, ...]], rounding: dict[str, bool]) -> None:
    """Round the inputs of these linear layers, by name on disk, in every pass from now on."""
    modules = dict(model.named_modules())
    targets = {name: names.target.get(f"{name}.weight", "").removesuffix(".weight") for name in rounding}
    alone = names.plain([f"{name}.weight" for name in rounding if f"{name}.weight" in names.target])
    if alone and all(isinstance(modules.get(target), torch.nn.Linear) for target in targets.values()):
        round_inputs(model, {targets[name]: way for name, way in rounding.items()})
        return
    found, layers = find_layers(model)
    origins = {}
    for index in range(len(layers)):
        inside = f"{found}.{index}."
        origins[inside] = names.origins({name: shapes[name] for name in names.stored(inside)}, inside, "")

    def holds(own: Slice) -> list[str]:
        for inside, origin in origins.items():
            if own.parameter.startswith(inside):
                inner = Slice(own.parameter.removeprefix(inside), own.offset, own.shape, own.strides)
                return origin.holds(inner)
        return []

    forward = model.forward

    def rounded(*args: Any, **kwargs: Any) -> Any:
        with rounded_products(model, holds, rounding):
            return forward(*args, **kwargs)

    model.forward = rounded
    model.rounds_activations = True
