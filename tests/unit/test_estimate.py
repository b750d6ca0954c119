"""The plan's arithmetic: bytes as the packers write them, memory as the stages say, counts as the solvers have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.graph.schedule import threads_of
from tasks import solvers
from tasks.activations import gram
from tasks.errors import TaskError
from tasks.formats import load_format
from tasks.hardware import current_memory
from tasks.model import layout
from tasks.model.decoder import Decoder
from tasks.planning import estimate as plan
from tasks.planning.estimate import PlanJob, estimate, linear_bytes, statistics_bytes, variant_bytes
from tasks.planning.machine import Machine, check_machine, read_machine, write_machine
from tasks.planning.shape import Shape, read_shape
from tasks.quantizers import sensitivity
from tasks.scoring.eval_tasks import local_tasks
from tasks.settings import Settings, check_settings, load_settings
from tasks.solvers import awq, gptq
from tasks.statistics import estimate_bytes
from tests.tiny import tiny_model
from tests.unit.test_shape import LLAMA_2_7B, LLAMA_3_70B, MIXTRAL_8X7B

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = load_settings(ROOT / "params.yaml")
STAGES = [
    *("download", "datasets", "calibrate", "statistics"),
    *(f"{kind}@{name}" for kind in ("quantize", "export", "evaluate", "benchmark") for name in SETTINGS.variants),
    *("report", "package"),
]
# two cores of an Intel Xeon without a GPU, measured just before DEMO
QUIET = check_machine(
    {
        "name": "2 cores",
        "cores": 2,
        "memory_gb": 25.3,
        "disk_gb": 52.8,
        "product_gflops": 238.09,
        "half_gflops": 142.74,
        "integer_gflops": 1089.72,
        "factor_gflops": 65.2,
        "memory_gbs": 77.17,
        "fresh_gbs": 4.73,
        "stream_gbs": 24.93,
        "disk_read_gbs": 6.448,
        "disk_write_gbs": 0.731,
        "hash_gbs": 1.137,
        "call_us": 2.52,
        "layer_us": 245.0,
        "start_s": 8.2,
        "base_gb": 0.65,
    },
    "here",
)
SLOW_TO_START = check_machine(QUIET.model_dump() | {"start_s": 3 * QUIET.start_s}, "here")
SMOLLM2 = LLAMA_2_7B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def job(config: dict[str, Any], settings: Settings = SETTINGS, machine: Machine = QUIET, threads: int = 1) -> PlanJob:
    return PlanJob(read_shape(config, "here"), settings, machine.share(threads))


def changed(**changes: Any) -> Settings:
    """params.yaml with other values: section__key=value."""
    values = SETTINGS.model_dump(exclude_unset=True)
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return check_settings(values)


@pytest.mark.parametrize("name", ["int8", "gptq-int4", "awq-int4"])
@pytest.mark.parametrize("shape", [(64, 128), (96, 192), (32, 64)])
def test_a_pressed_layer_has_the_bytes_that_its_packer_writes(name: str, shape: tuple[int, int]) -> None:
    variant, weight = SETTINGS.variants[name], torch.randn(shape)
    form = load_format(variant.format)
    precision = layout.precision(form, variant.precision, torch.float16 if variant.scale_dtype else torch.bfloat16)
    precision = replace(precision, grid=precision.grid.fitted(shape[1]))
    tensors = form.pack(precision.grid.round(weight), precision)
    assert linear_bytes(*shape, variant, scale=2) == sum(t.numel() * t.element_size() for t in tensors.values())


def test_the_counts_are_those_of_the_solvers() -> None:
    assert (plan.SCALE_TRIALS, plan.ROWS) == (awq.SCALE_TRIALS, awq.ROWS)
    assert len(awq.CLIP_SHARES) + 4 * len(awq.CLIP_STEPS) == plan.CLIP_TRIALS
    assert solvers.PART == plan.PART
    assert (gptq.BLOCK, gram.BLOCK) == (plan.BLOCK, plan.SUMMED)
    assert sensitivity.SEQUENCES * sensitivity.LENGTH == plan.STREAM
    assert sensitivity.FINE == plan.FINE
    assert set(plan.ITEMS) == set(local_tasks(ROOT / "evals"))


def test_the_memory_of_statistics_is_what_the_stage_says_of_itself(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", hidden=256, layers=2)
    tokens = torch.zeros(48, 512, dtype=torch.int64)
    decoder = Decoder(model, torch.float32, "cpu")
    said = estimate_bytes(decoder, tokens, importance=True) - current_memory()
    config = decoder._base.config.to_dict()
    settings = changed(calibration__samples=48, calibration__sequence_length=512)
    need = estimate("statistics", job(config, settings))
    # the process grows a little between the two
    assert need.memory == pytest.approx(said + QUIET.base_gb * 1e9, abs=2e6)


# params.yaml as it was when the figures below were measured
MEASURED_VALUES = SETTINGS.model_dump(exclude_unset=True)
MEASURED_VALUES["variants"]["awq-int4"]["format"] = "awq"
MEASURED_VALUES["variants"]["auto"] |= {"candidates": ["W4A16_ASYM@64", "W4A16_ASYM@128", "W8A16@64", "W8A16@128"]}
for key in ("smoothing", "symmetric_activations"):
    del MEASURED_VALUES["variants"]["auto"][key]
MEASURED = check_settings(MEASURED_VALUES)

# What `make demo` took in an empty clone, just after QUIET: seconds of the stage, DVC included; peak memory; bytes of
# safetensors.
DEMO = {
    "statistics": (140, 1_160_593_408, 412_584_736),
    "quantize@int8": (33, 891_957_248, 163_536_608),
    "quantize@gptq-int4": (69, 852_496_384, 114_029_456),
    "quantize@awq-int4": (86, 979_873_792, 113_999_904),
    "quantize@auto": (264, 1_484_394_496, 116_511_720),
    "evaluate@base": (129, 1_543_467_008, 0),
    "evaluate@int8": (130, 2_434_916_352, 0),
    "evaluate@gptq-int4": (155, 2_367_049_728, 0),
    "evaluate@awq-int4": (149, 2_502_926_336, 0),
    "evaluate@auto": (146, 2_367_791_104, 0),
    "benchmark@base": (23, 1_435_947_008, 0),
    "benchmark@int8": (35, 2_371_719_168, 0),  # memory: of an earlier run, with the baseline beside it
    "benchmark@gptq-int4": (11, 1_417_658_368, 0),
    "benchmark@awq-int4": (14, 1_885_487_104, 0),
    "benchmark@auto": (11, 1_409_064_960, 0),
}
SHORT = 30  # seconds: less than that is mostly the start of processes, of which only the library's share is estimated


@pytest.mark.parametrize("stage", DEMO)
def test_the_demo_took_what_is_estimated(stage: str) -> None:
    seconds, memory, disk = DEMO[stage]
    need = estimate(stage, job(SMOLLM2, MEASURED, threads=threads_of(stage, (), (stage,), 2, 2)))
    assert need.memory == pytest.approx(memory, rel=0.3)
    assert need.disk == pytest.approx(disk, rel=0.01)
    assert need.seconds == pytest.approx(seconds, **({"rel": 0.3} if seconds > SHORT else {"abs": 10}))


def test_twice_the_tokens_take_twice_the_pass_and_no_more_disk() -> None:
    one, two = (estimate("statistics", job(LLAMA_2_7B, changed(calibration__samples=n))) for n in (64, 128))
    assert one.seconds is not None
    assert two.seconds is not None
    assert 1.8 < two.seconds / one.seconds < 2
    weights = 4 * 4 * 32  # a number for each token in each of four inputs of 32 layers
    assert one.disk - 64 * 512 * weights == two.disk - 128 * 512 * weights
    assert one.disk - 64 * 512 * weights == statistics_bytes(read_shape(LLAMA_2_7B, "here"))


def test_the_pass_over_a_large_model_is_its_products() -> None:
    """Two operations for a weight and a token, two for each pair of channels, pairs counted once: what else is counted
    is little of it."""
    need = estimate("statistics", job(LLAMA_2_7B, changed(statistics__importance=False), threads=2))
    products = 2 * 16384 * (32 * 202_375_168 + 32 * (3 * 4096**2 + 11008**2) / 2)
    assert need.seconds is not None
    assert 1 < need.seconds / (products / (QUIET.product_gflops * 1e9)) < 1.6


def test_weights_for_the_tokens_take_two_passes_more_and_the_predictions() -> None:
    plain, weighed = (
        estimate("statistics", job(LLAMA_2_7B, changed(statistics__importance=wanted))) for wanted in (False, True)
    )
    assert plain.seconds is not None
    assert weighed.seconds is not None
    passes = 2 * 2 * 16384 * 32 * 202_375_168 + 2 * 2 * 16384 * 4096 * 32000
    assert 1 < (weighed.seconds - plain.seconds) / (passes / (QUIET.product_gflops * 1e9)) < 2.2
    assert weighed.scratch == 33 * 2 * 16384 * 4096


def test_an_expert_is_pressed_as_a_layer_of_its_own() -> None:
    dense = read_shape(LLAMA_2_7B | {"num_key_value_heads": 8, "intermediate_size": 14336}, "here")
    experts = read_shape(MIXTRAL_8X7B, "here")

    def grams(shape: Shape) -> int:
        return statistics_bytes(shape) - 4 * (4096**2 + 2 * 4096)  # those of the output layer's input

    attention = 32 * 4 * 2 * (4096**2 + 2 * 4096)
    assert grams(experts) - attention == 8 * (grams(dense) - attention)
    variant = SETTINGS.variants["gptq-int4"]
    expert = 3 * linear_bytes(14336, 4096, variant, 2) * 32 * 8
    assert 0.9 < expert / variant_bytes(job(MIXTRAL_8X7B), variant) < 1


@pytest.mark.parametrize("config", [LLAMA_2_7B, LLAMA_3_70B, MIXTRAL_8X7B], ids=["7B", "70B", "experts"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_an_estimate(config: dict[str, Any], stage: str) -> None:
    need, later = (estimate(stage, job(config, machine=machine)) for machine in (QUIET, SLOW_TO_START))
    assert need.seconds is not None
    assert later.seconds is not None
    processes = 2 if stage == "package" else 1  # it tries the bundle in one of its own
    assert later.seconds - need.seconds == pytest.approx(processes * (SLOW_TO_START.start_s - QUIET.start_s))
    idle = ("datasets", "calibrate", "quantize@base", "report")
    assert (need.seconds - processes * QUIET.start_s > 0) == (stage not in idle)
    assert need.memory is not None
    assert need.memory >= 1e9 * QUIET.base_gb


def test_what_is_not_known_is_said() -> None:
    values = SETTINGS.model_dump(exclude_unset=True)
    values["variants"]["int8"] |= {"backend": "llm-compressor", "rounding": "nearest"}
    values["evaluation"]["tasks"] = ["piqa_local", "hellaswag"]
    known = job(SMOLLM2, check_settings(values))
    assert estimate("quantize@int8", known).seconds is None
    assert "llm-compressor" in (estimate("quantize@int8", known).note or "")
    assert "hellaswag" in (estimate("evaluate@base", known).note or "")
    assert estimate("dance", known).seconds is None


def test_more_cores_take_less_time_and_a_network_is_counted() -> None:
    one, two = (estimate("statistics", job(LLAMA_2_7B, threads=threads)).seconds or 0 for threads in (1, 2))
    assert 1.5 < one / two < 2
    fast = check_machine(QUIET.model_dump() | {"network_gbs": 0.1}, "here")
    alone, with_network = (estimate("download", job(LLAMA_2_7B, machine=m)).seconds or 0 for m in (QUIET, fast))
    assert with_network - alone == pytest.approx(2 * 6_738_415_616 / 0.1e9)


def test_a_machine_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_machine(tmp_path / "machine.yaml", QUIET)
    assert read_machine(tmp_path / "machine.yaml") == QUIET


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"product_gflops": "fast"}, "product_gflops"),
        ({"cores": 0}, "cores: input should be greater"),
        ({"speed": 3}, "speed: extra inputs"),
    ],
)
def test_a_bad_figure_of_a_machine_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        check_machine(QUIET.model_dump() | change, "here")


def test_layers_side_by_side_hold_their_memory_together() -> None:
    one, two = (estimate("quantize@gptq-int4", job(LLAMA_2_7B, threads=threads)).memory or 0 for threads in (1, 2))
    assert 2 < two / one < 2.2  # and the one that waits for them
    small = {estimate("quantize@gptq-int4", job(SMOLLM2, threads=threads)).memory for threads in (1, 2)}
    assert len(small) == 1  # too small to be shared
    gptq = SETTINGS.variants["gptq-int4"].model_dump(exclude_unset=True)
    after = changed(**{"variants__gptq-int4": gptq | {"propagate": True}})  # one layer must follow the other
    needs = [estimate("quantize@gptq-int4", job(LLAMA_2_7B, after, threads=threads)).memory for threads in (1, 2)]
    assert needs[0] == needs[1]
