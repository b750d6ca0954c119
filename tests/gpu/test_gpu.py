"""The paths that only an NVIDIA GPU takes: pytest --run-gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tasks.device import compute_device, peak_memory, processor_name
from tasks.quantizers import Job, quantizer
from tasks.runtimes import load_runtime
from tasks.settings import load_settings
from tasks.statistics import collect

pytestmark = pytest.mark.gpu


def test_the_gpu_is_found_and_named() -> None:
    assert compute_device() == "cuda"
    assert processor_name() == torch.cuda.get_device_name(0)
    torch.zeros(2**20, device="cuda")
    assert peak_memory() >= 2**22


@pytest.mark.parametrize("name", ["int8", "gptq-int4", "awq-int4"])
def test_a_method_makes_a_model_that_scores_as_on_a_cpu(name: str, llama: Path, tmp_path: Path) -> None:
    variant = load_settings(Path("params.yaml")).variant(name)
    tokens = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    calibration = tmp_path / "calibration"
    calibration.mkdir()
    save_file({"input_ids": tokens}, calibration / "tokens.safetensors")
    collect(llama, calibration, tmp_path / "statistics", importance=True)
    pressed = tmp_path / "pressed"
    pressed.mkdir()
    quantizer(variant).press(Job(llama, tokens, tmp_path / "statistics", variant, "cuda", pressed))
    for file in llama.glob("tokenizer*"):
        (pressed / file.name).write_bytes(file.read_bytes())
    ours = load_runtime("transformers", pressed, "float32").logprobs(tokens[:1])
    base = load_runtime("transformers", llama, "float32").logprobs(tokens[:1])
    divergence = (base.exp() * (base - ours)).sum(-1).mean().item()
    assert 0 < divergence < 0.2
