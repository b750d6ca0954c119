"""The size of a model that is to be pressed, held against the files that pressing writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from tasks.checks.serving_memory import check_serving_memory, variant_shape
from tasks.deployment.shape import read_shape
from tasks.deployment.sizing import obstacles
from tasks.errors import TaskError
from tasks.model.hollow import hollow_model, variant_bytes
from tasks.output import write_manifest
from tasks.quantize import quantize
from tasks.settings import HardwareSettings, load_settings
from tasks.settings.variant import VariantSettings
from tasks.statistics import collect
from tasks.tensor_files import read_header
from tests.tiny import tiny_model
from tools.tiny_models import write_tiny

ROOT = Path(__file__).resolve().parents[2]
VARIANTS: dict[str, dict[str, Any]] = {
    "W8A8": {"scheme": "W8A8"},
    "W4A16 compressed-tensors": {"scheme": "W4A16", "group_size": 32},
    "W4A16_ASYM compressed-tensors": {"scheme": "W4A16_ASYM", "group_size": 64},
    "W4A16_ASYM float16": {"scheme": "W4A16_ASYM", "group_size": 64, "scale_dtype": "float16"},
    "W8A16 compressed-tensors": {"scheme": "W8A16", "group_size": 32},
    "W4A16 awq": {"scheme": "W4A16", "group_size": 64, "format": "awq"},
    "W4A16_ASYM awq": {"scheme": "W4A16_ASYM", "group_size": 64, "format": "awq"},
    "W4A16 gptq": {"scheme": "W4A16", "group_size": 64, "format": "gptq"},
    "W4A16_ASYM gptq": {"scheme": "W4A16_ASYM", "group_size": 64, "format": "gptq"},
    "W8A16 gptq": {"scheme": "W8A16", "group_size": 64, "format": "gptq"},
    "a layer skipped": {"scheme": "W4A16_ASYM", "group_size": 64, "skip_layers": [1]},
    "the output layer": {"scheme": "W4A16_ASYM", "group_size": 64, "output_layer": "W8A16@64"},
    "none": {"scheme": "none"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with what pressing needs, in `model`, `calibration` and `statistics`."""
    root = tmp_path_factory.mktemp("sizes")
    write_manifest(tiny_model(root / "model", hidden=128))
    (root / "calibration").mkdir()
    save_file({"input_ids": torch.randint(6, 200, (2, 32))}, root / "calibration/tokens.safetensors")
    write_manifest(root / "calibration")
    collect(root / "model", root / "calibration", root / "statistics", importance=False)
    return root


@pytest.fixture(scope="module")
def hollow(made: Path) -> Path:
    return hollow_model(AutoConfig.from_pretrained(made / "model"), "bfloat16", made / "hollow")


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_has_the_bytes_that_were_told_before(made: Path, hollow: Path, values: dict[str, Any]) -> None:
    variant = VariantSettings(**values)
    quantize("v", variant, made / "model", made / "calibration", made / "statistics", made / "v")
    written = sum(path.stat().st_size for path in (made / "v").glob("*.safetensors"))
    assert variant_bytes(variant, hollow) == written
    if not variant.is_baseline:  # and is spread over the same GPUs
        told, found = variant_shape(read_shape(hollow), variant, hollow), read_shape(made / "v")
        assert told.weights == pytest.approx(found.weights, abs=10_000)  # the header of the file
        assert told.outer_bytes == pytest.approx(found.outer_bytes, rel=0.2 if variant.scale_dtype else 0.01)
        for cards in (2, 3, 4):
            assert obstacles(told, cards) == obstacles(found, cards)


def test_a_mixture_has_the_bytes_of_its_budget(made: Path, hollow: Path) -> None:
    values = load_settings(ROOT / "params.yaml").variants["auto"].model_dump(exclude_unset=True)
    told = [variant_bytes(VariantSettings(**values | {"bits_per_weight": bits}), hollow) for bits in (4.5, 8.5)]
    weights = 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)
    assert told[1] - told[0] == pytest.approx(4 * weights / 8, rel=0.01)


def test_a_large_model_takes_no_disk_while_it_is_hollow(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    model = hollow_model(config, "bfloat16", tmp_path / "hollow") / "model.safetensors"
    assert model.stat().st_size == pytest.approx(2 * 70_553_706_496, rel=0.001)
    assert model.stat().st_blocks * 512 < 1_000_000


def test_a_hollow_model_has_the_tensors_of_a_saved_one(made: Path, hollow: Path) -> None:
    assert read_header(hollow / "model.safetensors") == read_header(made / "model/model.safetensors")


def test_experts_that_are_stacked_are_sized_as_they_are_written(tmp_path: Path) -> None:
    write_manifest(write_tiny("gpt_oss", tmp_path / "model"))
    (tmp_path / "calibration").mkdir()
    save_file({"input_ids": torch.randint(6, 150, (2, 64))}, tmp_path / "calibration/tokens.safetensors")
    write_manifest(tmp_path / "calibration")
    folders = tmp_path / "model", tmp_path / "calibration", tmp_path / "statistics"
    collect(*folders, importance=False)
    variant = VariantSettings(scheme="W4A16", group_size=32)
    quantize("v", variant, *folders, tmp_path / "v")
    written = sum(path.stat().st_size for path in (tmp_path / "v").glob("*.safetensors"))
    hollow = hollow_model(AutoConfig.from_pretrained(folders[0]), "float32", tmp_path / "hollow")
    assert variant_bytes(variant, hollow) == written


def test_for_onnx_only_the_memory_of_a_machine_without_gpus_counts(hollow: Path) -> None:
    def check(hardware: HardwareSettings) -> None:
        settings = load_settings(ROOT / "params.yaml")
        package = settings.package.model_copy(update={"hardware": hardware})
        check_serving_memory(settings.model_copy(update={"targets": ("onnx",), "package": package}), hollow)

    check(HardwareSettings(memory=8))
    check(HardwareSettings(gpu="NVIDIA-H100", memory=2))
    with pytest.raises(TaskError, match=r"package\.hardware has 4 GB of memory and no GPU, too little for this model"):
        check(HardwareSettings(memory=4))
