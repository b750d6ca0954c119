"""A quantized model whose layers differ in bits, groups and zero points, like the scheme mixed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.formats import Layout, load_format
from tasks.grid import Grid, Precision
from tasks.tensor_files import EMBEDDING, OUTPUT

ALONE = "gate_proj"  # the unquantized layer
GRIDS = {
    "q_proj": Grid(4, 32, False, torch.bfloat16),
    "k_proj": Grid(4, 64, False, torch.bfloat16),
    "v_proj": Grid(8, 32, True, torch.bfloat16),
    "o_proj": Grid(8, 64, True, torch.bfloat16),
    "up_proj": Grid(4, 64, True, torch.bfloat16),
    "down_proj": Grid(4, 128, False, torch.bfloat16),
}


def mixed_model(model: Path, directory: Path) -> Path:
    """Write the tiny `model`, rounded to `GRIDS`, to `directory` as compressed-tensors; returns `directory`."""
    return rounded_model(model, directory, {end: Precision(grid) for end, grid in GRIDS.items()})


def rounded_model(
    model: Path, directory: Path, precisions: Mapping[str, Precision | None], form: str = "compressed-tensors"
) -> Path:
    """Write the tiny `model` to `directory`, its linear layers rounded to nearest; returns `directory`.

    precisions: by name suffix; the first match applies, "" matches all other layers in the decoder; None or no match:
    unquantized. A tied output layer replaces the embedding, which then has no weight.
    """
    directory.mkdir()
    way, tensors = load_format(form), load_file(model / "model.safetensors")
    names = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dim() == 2]
    if f"{OUTPUT}.weight" not in tensors and OUTPUT in precisions:
        tensors[f"{OUTPUT}.weight"] = tensors.pop(f"{EMBEDDING}.weight")
        names[names.index(EMBEDDING)] = OUTPUT
    own: dict[str, Precision] = {}
    for name in names:
        inside = ".layers." in name
        end = next((end for end in precisions if name.endswith(end) and (inside or end == name)), None)
        if end is not None and (found := precisions[end]):
            own[name] = found
    layers = [name for name in names if ".layers." in name or name in own]
    layout = Layout({name: (*tensors[f"{name}.weight"].shape,) for name in layers}, own)
    written: dict[str, Tensor] = {name: tensor for name, tensor in tensors.items() if name[:-7] not in own}
    for name, precision in own.items():
        packed = way.pack(precision.grid.round(tensors[f"{name}.weight"]), precision)
        written |= {f"{name}.{end}": part.contiguous() for end, part in packed.items()}
    save_file(written, directory / "model.safetensors", {"format": "pt"})
    described = json.loads((model / "config.json").read_text()) | {"quantization_config": way.describe(layout)}
    (directory / "config.json").write_text(json.dumps(described))
    for file in (*model.glob("*token*"), model / "chat_template.jinja"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def untied(model: Path, directory: Path) -> Path:
    """Write the tiny `model` with an untied output layer to `directory`; returns `directory`."""
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    random = torch.Generator().manual_seed(1)
    weight = tensors[f"{EMBEDDING}.weight"]
    tensors[f"{OUTPUT}.weight"] = (weight + 0.1 * torch.randn(weight.shape, generator=random)).to(weight.dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
