"""Code paths for NVIDIA GPUs: pytest --run-gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks import statistics
from tasks.activations.store import load_statistics
from tasks.device import compute_device
from tasks.hardware import peak_memory, processor_name
from tasks.output import checksums
from tasks.quantizers import QuantizeJob, press
from tasks.runtimes import load_runtime, transformers
from tasks.settings import VariantSettings, load_settings
from tasks.statistics import collect
from tests.tiny import tiny_model

pytestmark = pytest.mark.gpu


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    folder = tmp_path / "calibration"
    folder.mkdir()
    tokens = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens}, folder / "tokens.safetensors")
    return folder


def test_gpu_is_found_and_named() -> None:
    assert compute_device() == "cuda"
    assert processor_name() == torch.cuda.get_device_name(0)
    torch.zeros(2**20, device="cuda")
    assert peak_memory() >= 2**22


def test_statistics_equal_those_of_a_cpu(
    llama: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for importance in (False, True):
        on_gpu, on_cpu = tmp_path / f"gpu-{importance}", tmp_path / f"cpu-{importance}"
        assert collect(llama, calibration, on_gpu, importance).device == "cuda"
        with monkeypatch.context() as patch:
            patch.setattr(statistics, "compute_device", lambda: "cpu")
            assert collect(llama, calibration, on_cpu, importance).device == "cpu"
        for layer in range(2):
            found, expected = (load_statistics(folder, layer, "cpu") for folder in (on_gpu, on_cpu))
            assert found.keys() == expected.keys()
            for name, known in expected.items():
                share = 0.05 if importance else 0.02  # bfloat16 products, also in the backward pass
                assert (found[name].gram - known.gram).norm() < share * known.gram.norm()
                assert (found[name].mean - known.mean).norm() < 0.02 * known.mean.norm()


@pytest.mark.parametrize("importance", [False, True])
def test_statistics_take_the_estimated_memory(tmp_path: Path, importance: bool) -> None:
    model = tiny_model(tmp_path / "model", hidden=2048, layers=3, heads=32, kv_heads=4)
    (tmp_path / "calibration").mkdir()
    tokens = torch.randint(3, 300, (16, 256), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens}, tmp_path / "calibration/tokens.safetensors")
    torch.cuda.reset_peak_memory_stats()
    report = collect(model, tmp_path / "calibration", tmp_path / "out", importance)
    assert report.dtype == "bfloat16"
    assert report.peak_memory_bytes == pytest.approx(report.estimate_bytes, rel=0.25)


@pytest.mark.parametrize("name", ["int8", "gptq-int4", "awq-int4", "auto"])
def test_variants_score_as_on_a_cpu(
    name: str, llama: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(llama, calibration, tmp_path / "statistics", importance=True)
    variant = load_settings(Path("params.yaml")).variant(name)
    if name == "auto":
        variant = variant.model_copy(update={"candidates": ["W4A16_ASYM@32", "W8A8"], "bits_per_weight": 6.0})
    pressed = [_press(llama, calibration, variant, tmp_path / str(time)) for time in range(2)]
    assert checksums(pressed[0]) == checksums(pressed[1])
    tokens = load_file(calibration / "tokens.safetensors")["input_ids"][:1]
    base = load_runtime("transformers", llama, "float32").logprobs(tokens)
    ours = load_runtime("transformers", pressed[0], "float32").logprobs(tokens)
    assert base.device.type == ours.device.type == "cuda"
    divergence = (base.exp() * (base - ours)).sum(-1).mean().item()
    assert 0 < divergence < 0.2
    monkeypatch.setattr(transformers, "compute_device", lambda: "cpu")
    there = load_runtime("transformers", pressed[0], "float32").logprobs(tokens)
    # 8-bit activations round differently where their last bits differ
    assert (there - ours.cpu()).abs().mean() < (0.05 if name in ("int8", "auto") else 1e-3)


def test_errors_are_propagated(llama: Path, calibration: Path, tmp_path: Path) -> None:
    collect(llama, calibration, tmp_path / "statistics", importance=True)
    variant = load_settings(Path("params.yaml")).variant("gptq-int4").model_copy(update={"propagate": True})
    assert (_press(llama, calibration, variant, tmp_path / "pressed") / "model.safetensors").exists()


@pytest.mark.parametrize("importance", [False, True])
def test_statistics_are_reproducible(llama: Path, calibration: Path, tmp_path: Path, importance: bool) -> None:
    for time in ("first", "second"):
        collect(llama, calibration, tmp_path / time, importance)
    assert checksums(tmp_path / "first") == checksums(tmp_path / "second")


def _press(llama: Path, calibration: Path, variant: VariantSettings, destination: Path) -> Path:
    destination.mkdir()
    tokens = load_file(calibration / "tokens.safetensors")["input_ids"]
    press(QuantizeJob(llama, tokens, destination.parent / "statistics", variant, "cuda", destination))
    for file in llama.glob("tokenizer*"):
        (destination / file.name).write_bytes(file.read_bytes())
    return destination
