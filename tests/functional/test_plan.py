"""`modelpress plan --model` as a person calls it, and the estimate of disk held against what the stages write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flows.planning.simulate import measure
from tasks.output import write_manifest
from tasks.planning.estimate import PlanJob, estimate
from tasks.planning.machine import read_machine, write_machine
from tasks.planning.shape import read_shape
from tasks.quantize import quantize
from tasks.settings import check_settings
from tasks.statistics import collect
from tests.functional.toy import PROJECT, Toy
from tests.tiny import tiny_model
from tests.unit.test_estimate import QUIET, SETTINGS
from tests.unit.test_shape import LLAMA_2_7B


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A project in which nothing has run."""
    return Toy.create(tmp_path_factory.mktemp("plan") / "toy")


def test_a_run_is_estimated_from_a_config_alone(fresh: Toy) -> None:
    fresh.write("seven/config.json", json.dumps(LLAMA_2_7B))
    write_machine(fresh.root / "server.yaml", QUIET)
    before = fresh.executed()
    done = fresh.cli("plan", "--model", "seven", "--machine", "server.yaml", "--memory", "512", "--network", "0.1")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("model    llama, 6.74 billion parameters, 13.5 GB in bfloat16")
    assert "given: memory_gb, network_gbs" in said[1]
    assert {line.split()[0] for line in said if "@" in line} >= {"quantize@int8", "benchmark@base"}
    assert any(line.startswith("time ") for line in said)
    assert "fits" in done.stdout
    assert fresh.executed() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "24"], "add --model"),
        (["--model", "nowhere"], "nowhere is not there"),
        (["--model", "hf:no/revision"], "names no revision"),
        (["--model", "seven", "--machine", "seven/config.json"], "memory_gb: field required"),
    ],
)
def test_what_cannot_be_estimated_is_one_clear_line(fresh: Toy, arguments: list[str], words: str) -> None:
    fresh.write("seven/config.json", json.dumps(LLAMA_2_7B))
    done = fresh.call("plan", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


def test_the_stages_write_what_is_estimated(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", hidden=256, layers=2)
    write_manifest(model)
    tokens = torch.randint(6, 200, (4, 32), generator=torch.Generator().manual_seed(0))
    (tmp_path / "calibration").mkdir()
    save_file({"input_ids": tokens}, tmp_path / "calibration/tokens.safetensors")
    write_manifest(tmp_path / "calibration")
    values = SETTINGS.model_dump(exclude_unset=True)
    values["calibration"] |= {"samples": 4, "sequence_length": 32}
    settings = check_settings(values)
    shape = read_shape(json.loads((model / "config.json").read_text()), "here")
    job = PlanJob(shape, settings, QUIET)
    report = collect(model, tmp_path / "calibration", tmp_path / "statistics", importance=True)
    assert report.bytes == pytest.approx(estimate("statistics", job).disk, rel=0.01)
    for name in ("int8", "gptq-int4", "awq-int4"):
        variant, place = settings.variants[name], tmp_path / name
        quantize(name, variant, model, tmp_path / "calibration", tmp_path / "statistics", place)
        written = sum(path.stat().st_size for path in place.glob("*.safetensors"))
        assert written == pytest.approx(estimate(f"quantize@{name}", job).disk, rel=0.02)


@pytest.mark.slow
def test_a_machine_can_be_measured_and_what_was_measured_is_kept(tmp_path: Path) -> None:
    found = measure(PROJECT)
    assert found.source.startswith("measured")
    write_machine(tmp_path / "machine.yaml", found)
    assert read_machine(tmp_path / "machine.yaml") == found
