"""`modelpress plan --model` as it is called, and its estimate held against the stages themselves on a tiny model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from tasks.export import export
from tasks.output import write_manifest
from tasks.planning.need import Need
from tasks.planning.stages import Run
from tasks.quantize import quantize
from tasks.settings import BASE, Settings, check_settings, load_settings
from tasks.statistics import collect
from tests.functional.toy import PROJECT, Toy
from tests.tiny import tiny_model

SETTINGS = load_settings(PROJECT / "params.yaml")
LAYERS, SAMPLES, LENGTH = 4, 8, 128


def settings() -> Settings:
    values = SETTINGS.model_dump(exclude_unset=True)
    values["calibration"] |= {"samples": SAMPLES, "sequence_length": LENGTH}
    values["variants"] = {name: values["variants"][name] for name in ("base", "int8", "auto")}
    values["variants"]["ahead"] = SETTINGS.variants["gptq-int4"].model_dump(exclude_unset=True) | {
        "propagate": True,
        "format": "awq",
    }
    return check_settings(values)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plan") / "model"
    write_manifest(tiny_model(directory, hidden=256, layers=LAYERS))
    return directory


@pytest.fixture(scope="module")
def needs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Need]:
    """Of every stage, each with one thread, measured with time enough."""
    wanted = settings()
    kinds = ("quantize", "export", "evaluate", "benchmark")
    stages = [
        "download",
        "statistics",
        "reference",
        *(f"{kind}@{name}" for kind in kinds for name in wanted.variants),
        "package",
    ]
    root, config = tmp_path_factory.mktemp("measuring"), AutoConfig.from_pretrained(model)
    threads = torch.get_num_threads()
    run = Run(wanted, config, root, dict.fromkeys([*stages, "dance"], 1), time.monotonic() + 1e6)
    try:
        return run.needs(measured=True)
    finally:
        torch.set_num_threads(threads)


def test_every_stage_has_an_estimate(needs: dict[str, Need]) -> None:
    for stage, need in needs.items():
        assert need.seconds is not None, f"{stage}: {need.note}"
        assert (need.seconds > 0) == (need.note != "takes seconds")
        assert need.memory > 0
        assert not need.rough
    small = {stage for stage, need in needs.items() if need.seconds == 0}
    assert small == {"download", "quantize@base", "evaluate@base", "package", "dance"}
    assert needs["quantize@auto"].seconds > needs["quantize@int8"].seconds  # type: ignore[operator]


def test_the_stages_take_and_write_what_is_estimated(model: Path, needs: dict[str, Need], tmp_path: Path) -> None:
    """Seconds within a factor of two, for they are few; bytes to the byte, but for what a mixture chooses."""
    (tmp_path / "calibration").mkdir()
    tokens = torch.randint(6, 200, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens}, tmp_path / "calibration/tokens.safetensors")
    write_manifest(tmp_path / "calibration")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def taken(work: Callable[[], object]) -> float:
        began = time.thread_time()
        work()
        return time.thread_time() - began

    inputs = (model, tmp_path / "calibration", tmp_path / "statistics")
    try:
        found = {"statistics": taken(lambda: collect(*inputs, importance=True))}
        for name, variant in settings().variants.items():
            made = tmp_path / "models" / name
            found[f"quantize@{name}"] = taken(lambda n=name, v=variant, m=made: quantize(n, v, *inputs, m))  # type: ignore[misc]
            written = sum(path.stat().st_size for path in made.glob("*.safetensors"))
            if name == "auto":
                assert written == pytest.approx(needs["quantize@auto"].disk, rel=0.1)
            elif name != BASE:
                assert written == needs[f"quantize@{name}"].disk
            export(made, "transformers", tmp_path / "exports" / name)
    finally:
        torch.set_num_threads(threads)
    for stage, seconds in found.items():
        if stage == "quantize@base":  # takes no time worth an estimate
            continue
        assert max(0.0, seconds - 0.5) / 2 < (needs[stage].seconds or 0.0) < 2 * (seconds + 0.5), stage
    written = sum(path.stat().st_size for path in (tmp_path / "statistics").glob("*.safetensors"))
    assert written == pytest.approx(needs["statistics"].disk, rel=0.02)  # the files' heads


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A project in which nothing has run."""
    toy = Toy.create(tmp_path_factory.mktemp("plan") / "toy")
    toy.set(variants={name: SETTINGS.variants[name].model_dump(exclude_unset=True) for name in ("base", "int8")})
    tiny_model(toy.root / "tiny", hidden=64, layers=2)
    tiny_model(toy.root / "twice", hidden=64, layers=4)
    return toy


def test_a_run_is_estimated_from_a_config_alone_and_kept(fresh: Toy) -> None:
    (fresh.root / "tiny/model.safetensors").unlink()
    before = fresh.executed()
    done = fresh.cli("plan", "--model", "tiny", "--memory", "512", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("model    llama, 0 million parameters")
    assert "512.0 GB memory" in said[1]
    assert {line.split()[0] for line in said if "@" in line} >= {"quantize@int8", "benchmark@base"}
    assert any(line.startswith("time ") for line in said)
    assert "fits" in done.stdout
    assert fresh.executed() == before
    kept = fresh.root / said[-1].split()[2].rstrip(";")
    there = json.loads(kept.read_text())
    there["needs"]["quantize@int8"] |= {"seconds": 600.0, "rough": False}
    fresh.write("server.json", json.dumps(there | {"machine": "a server"}))
    carried = fresh.cli("plan", "--model", "twice", "--machine", "server.json", "--jobs", "1")
    assert carried.returncode == 0, carried.stderr
    assert "a server" in carried.stdout
    (line,) = (line for line in carried.stdout.splitlines() if line.startswith("quantize@int8"))
    assert "rough" in line
    assert " min " in line  # of a model with more layers, scaled


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "24"], "add --model"),
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--model", "hf:no/revision"], "names no revision"),
        (["--model", "tiny", "--machine", "tiny/config.json"], "is not a measurement"),
        (["--model", "bert"], "bert"),
    ],
)
def test_what_cannot_be_estimated_is_one_clear_line(fresh: Toy, arguments: list[str], words: str) -> None:
    fresh.write("bert/config.json", json.dumps({"model_type": "bert"}))
    done = fresh.call("plan", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
