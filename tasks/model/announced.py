"""The linear layers that a model's config.json and headers announce, before a text has passed through it.

What a pass finds (tasks/model/structure.py) counts; this serves what must be known earlier: whether settings fit the
model, and how large its variants will be.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.model.linears import Linear, why_left
from tasks.output import write_json

FILE = "linears.json"  # in the downloaded model, so that later stages need not build it


@dataclass(frozen=True)
class AnnouncedLayer:
    """One decoder layer. prefix: of its tensors on disk; linears: its linear layers by the rest of their names;
    unusual: those among them that are not `nn.Linear` in memory, such as experts."""

    prefix: str
    linears: dict[str, Linear]
    unusual: list[str]


@dataclass(frozen=True)
class Announced:
    """A model. layers: its decoder's. modules: all that an engine may take for a linear layer, by full name on disk:
    its name in memory. output, embedding: the modules of the output layer, None if it is tied, and
    of the embedding, by name on disk."""

    layers: list[AnnouncedLayer]
    modules: dict[str, str]
    output: str | None
    embedding: str | None


def announced(model: Path) -> Announced:
    """What is announced of the model in a directory. TaskError if its decoder layers are not found."""
    if not (model / FILE).exists():
        return _look(model, (model / "config.json").stat().st_mtime_ns)
    found = json.loads((model / FILE).read_text(encoding="utf-8"))
    layers = [
        AnnouncedLayer(
            one["prefix"],
            {name: Linear.read(own) for name, own in one["linears"].items()},
            one["unusual"],
        )
        for one in found["layers"]
    ]
    return Announced(**found | {"layers": layers})


def write_announced(model: Path) -> None:
    """Write what `announced` finds to the model's directory."""
    write_json(model / FILE, asdict(announced(model)))


@lru_cache(maxsize=4)
def _look(model: Path, changed: int) -> Announced:
    import torch
    from torch import nn

    from tasks.model.decoder import Decoder

    decoder = Decoder(model, torch.float32, "cpu")
    layers = [_layer(decoder, index) for index in range(len(decoder))]
    modules: dict[str, str] = {}
    outer: dict[Any, str] = {}
    for name, (owner, parameter, target) in decoder.owners().items():
        stem, place = name.removesuffix(".weight"), target.removesuffix(".weight")
        if isinstance(owner, nn.Linear) and name.endswith(".weight"):
            modules[stem] = place
        elif len(decoder.files.entry(name).shape) == 2 and _stacks(owner, parameter):
            modules[stem] = stem
        elif parameter.dim() == 2 and name.endswith(".weight") and not isinstance(owner, nn.Embedding):
            modules[stem] = place  # a router, which is a linear layer in vLLM
        outer[owner] = stem
    output, embedding = decoder.model.get_output_embeddings(), decoder.model.get_input_embeddings()
    return Announced(layers, modules, outer.get(output), outer.get(embedding))


def _stacks(module: Any, parameter: Any) -> bool:
    """Whether a parameter stacks matrices."""
    from torch import nn

    return parameter.dim() > 2 and not isinstance(module, nn.modules.conv._ConvNd)


def _layer(decoder: Any, index: int) -> AnnouncedLayer:
    """By the modules and parameters of a layer: matrices of `nn.Linear`, of its transposed kind, and stacks."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found: dict[str, Linear] = {}
    unusual: list[str] = []
    prefix = decoder.layer_prefix(index)
    owners = decoder.owners(index)
    shared = decoder.shared_weights(index)
    experts = {parameter.shape[0] for module, parameter, _ in owners.values() if _stacks(module, parameter)}
    for full, (module, parameter, _) in owners.items():
        name, shape = full.removeprefix(prefix), decoder.files.entry(full).shape
        if isinstance(module, nn.Linear | Conv1D) and len(shape) == 2:
            own = [Linear(name, 0, shape[0], isinstance(module, Conv1D), False, shape)]
        elif _stacks(module, parameter) and len(shape) == 2:
            own = [Linear(name, 0, shape[0], False, False, shape)]
        elif _stacks(module, parameter) and len(shape) == 3:
            turned = bool(getattr(module, "is_transposed", False))
            own = [Linear(name, at * shape[1], shape[1], turned, True, shape) for at in range(shape[0])]
        else:
            continue
        if not why_left(own[0], experts, shared):
            found |= {one.name: one for one in own}
            unusual += [] if isinstance(module, nn.Linear) else [one.name for one in own]
    return AnnouncedLayer(prefix, found, unusual)
