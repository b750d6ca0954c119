"""A pressed model whose layers differ in bits, groups and zero points, as a method leaves it that chooses for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tasks.formats.compressed import pack_words, words_config
from torch import Tensor

from tasks.grid import Grid

ALONE = "gate_proj"  # the layer that stays as it is
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
    directory.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        grid = GRIDS.get(stem.rpartition(".")[2])
        packed = pack_words(grid.round(tensor), grid) if grid else {"weight": tensor}
        tensors |= {f"{stem}.{end}": value.contiguous() for end, value in packed.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    described: dict[str, Any] = {}
    for number, (layer, grid) in enumerate(GRIDS.items()):
        one = words_config({"all": grid}, False, ["lm_head", f"re:.*{ALONE}$"])
        group = one["config_groups"]["group_0"] | {"targets": [f"re:.*{layer}$"]}
        described = one | {"config_groups": described.get("config_groups", {}) | {f"group_{number}": group}}
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": described}
    (directory / "config.json").write_text(json.dumps(config))
    for file in (*model.glob("token*"), model / "chat_template.jinja"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory
