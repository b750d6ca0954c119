"""The distinct inputs that a config.json announces, held against the files that the statistics stage writes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tasks.hardware import peak_memory
from tasks.model.arrival import clean_config, known_config, read_json
from tasks.model.hollow import hollow_model
from tasks.model.input_widths import input_widths
from tasks.output import write_manifest
from tasks.statistics import collect
from tasks.tensor_files import read_header
from tools.tiny_models import write_tiny

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BILLIONS = {  # as published
    "Llama-3.1-70B": 70.6,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235,
    "gpt-oss-120b": 117,
    "DeepSeek-V3": 671,
}


# grouped queries; all layers of experts; the same in transposed stacks; dense first layers, latent attention and a
# shared expert; experts that are modules of their own
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba"])
def test_the_inputs_are_those_of_the_statistics_files(kind: str, tmp_path: Path) -> None:
    model, calibration, statistics = (tmp_path / name for name in ("model", "calibration", "statistics"))
    write_manifest(write_tiny(kind, model))
    calibration.mkdir()
    draw = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(6, 150, (2, 64), generator=draw)}, calibration / "tokens.safetensors")
    write_manifest(calibration)
    collect(model, calibration, statistics, importance=False)
    widths = input_widths(model)
    assert len(widths) == 4 or kind == "jamba"
    for index, found in enumerate(widths):
        header = read_header(statistics / f"layers.{index}.safetensors")
        assert sorted(found) == sorted(entry.shape[0] for name, entry in header.items() if name.endswith(".gram"))


# the layers of Qwen3-235B-A22B are like those of Qwen3-30B-A3B
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * ("235B" in n)) for n in BILLIONS])
def test_a_model_of_any_size_is_known_by_its_config(name: str, tmp_path: Path) -> None:
    values, _ = clean_config(read_json(CONFIGS / f"{name}.json"), untied=False)
    before = peak_memory()
    model = hollow_model(known_config(values), "bfloat16", tmp_path / "model")
    parameters = sum(entry.count for entry in read_header(model / "model.safetensors").values())
    assert parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.003)
    widths = input_widths(model)
    inner, experts = {
        "Llama-3.1-70B": (28672, 1),
        "Qwen3-30B-A3B": (768, 128),
        "Qwen3-235B-A22B": (1536, 128),
        "gpt-oss-120b": (2880, 128),
        "DeepSeek-V3": (2048, 257),  # one of them sees all tokens
    }[name]
    assert Counter(widths[-1])[inner] >= experts
    assert len(widths) == values["num_hidden_layers"]
    assert peak_memory() - before < 1e9  # the weights have up to 1.3 TB
