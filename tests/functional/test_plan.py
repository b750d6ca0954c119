"""`modelpress plan --model` as it is called, and its estimate held against the stages themselves on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from flows.graph.plan import read_plan
from tasks.errors import TaskError
from tasks.export import export
from tasks.output import write_manifest
from tasks.planning.__main__ import measure
from tasks.planning.need import Measurement, read_measurement
from tasks.quantize import quantize
from tasks.settings import BASE, Settings, load_settings
from tasks.statistics import collect
from tests.functional.project import Checkout, params
from tests.functional.toy import PROJECT, Toy
from tests.tiny import Corpus, tiny_model

LAYERS, SAMPLES, LENGTH = 4, 8, 128
VARIANTS = ("base", "auto", "ahead")


@pytest.fixture(scope="module")
def project(llama: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A project in which nothing has run, with two models that differ in their number of layers."""
    values = params(llama, corpus)
    default = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))["variants"]
    ahead = default["gptq-int4"] | {"propagate": True, "format": "awq", "samples": None}
    values["variants"] = {"base": default["base"], "auto": default["auto"] | {"samples": None}, "ahead": ahead}
    values["calibration"] |= {"samples": SAMPLES, "sequence_length": LENGTH}
    toy = Toy(Checkout(tmp_path_factory.mktemp("plan") / "project", values).root)
    write_manifest(tiny_model(toy.root / "tiny", hidden=256, layers=LAYERS))
    tiny_model(toy.root / "twice", hidden=256, layers=2 * LAYERS)
    return toy


def settings(project: Toy) -> Settings:
    return load_settings(project.root / "params.yaml")


@contextmanager
def one_core() -> Iterator[None]:
    """This process and those it starts may use one core: with one thread, the processor time of a stage is steady."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs Linux")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def planned(project: Toy) -> tuple[list[str], Measurement]:
    """The output of `modelpress plan` for a model that is only a config.json, and the measurement that it keeps."""
    (project.root / "alone").mkdir()
    shutil.copy(project.root / "tiny/config.json", project.root / "alone")
    with one_core():
        done = project.call("plan", "--model", "alone", "--memory", "512", "--jobs", "1", "--seconds", "240")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return lines, read_measurement(project.root / lines[-1].split()[2].rstrip(";"))


def test_every_stage_has_an_estimate(project: Toy, planned: tuple[list[str], Measurement]) -> None:
    lines, found = planned
    assert lines[0].startswith("model    llama, ")
    assert "512.0 GB memory" in lines[1]
    assert any(line.startswith("time ") for line in lines)
    assert any(line.endswith(": fits") for line in lines)
    assert set(found.needs) == set(read_plan(project.root))
    for stage, need in found.needs.items():
        assert any(line.split()[:1] == [stage] for line in lines)
        assert need.seconds is not None, f"{stage}: {need.note}"
        assert (need.seconds > 0) == (need.note != "takes seconds")
        assert need.memory > 0
        assert not need.rough
    measured = {stage for stage, need in found.needs.items() if need.seconds}
    assert measured == {
        "statistics",
        "reference@transformers",
        *(f"quantize@{name}" for name in VARIANTS),
        *(f"{kind}@transformers-{name}" for kind in ("export", "evaluate", "load") for name in VARIANTS),
    } - {"quantize@base", "evaluate@transformers-base"}
    assert not (project.root / "models").exists()


def test_times_of_another_machine_are_scaled_to_another_model(
    project: Toy, planned: tuple[list[str], Measurement]
) -> None:
    _, found = planned
    needs = {stage: asdict(need) for stage, need in found.needs.items()}
    needs["quantize@auto"] |= {"seconds": 600.0, "rough": False}
    project.write("server.json", json.dumps(asdict(found) | {"machine": "a server", "needs": needs}))
    done = project.call("plan", "--model", "twice", "--machine", "server.json", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert "a server" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("quantize@auto"))
    assert "rough" in line
    assert " min " in line  # of a model with more layers, scaled


def test_the_stages_write_what_is_estimated(made: Path, planned: tuple[list[str], Measurement]) -> None:
    """To the byte, except for a mixture's choice."""
    needs = planned[1].needs
    for name in VARIANTS:
        written = sum(path.stat().st_size for path in (made / "models" / name).glob("*.safetensors"))
        if name == "auto":
            assert written == pytest.approx(needs["quantize@auto"].disk, rel=0.1)
        elif name != BASE:
            assert written == needs[f"quantize@{name}"].disk
    written = sum(path.stat().st_size for path in (made / "statistics").glob("*.safetensors"))
    assert written == pytest.approx(needs["statistics"].disk, rel=0.02)  # the files' heads


@pytest.mark.slow  # another program's load can double a time, so it needs a quiet machine
def test_the_stages_take_what_is_estimated(
    project: Toy, made: Path, planned: tuple[list[str], Measurement], one_thread: None
) -> None:
    """Seconds within a factor of two, because they are few."""
    inputs, again = (project.root / "tiny", made / "calibration", made / "statistics"), made / "again"
    works: dict[str, Callable[[], object]] = {
        "statistics": partial(collect, *inputs[:2], again / "statistics", importance=True)
    }
    for name, variant in settings(project).variants.items():
        if name != BASE:  # takes no time worth an estimate
            works[f"quantize@{name}"] = partial(quantize, name, variant, *inputs, again / name)
    for stage, work in works.items():
        began = time.thread_time()
        work()
        seconds = time.thread_time() - began
        assert max(0.0, seconds - 0.5) / 2 < (planned[1].needs[stage].seconds or 0.0) < 2 * (seconds + 0.5), stage


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As for a stage that runs alone on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(project: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages' outputs for the model that was planned for."""
    folder = tmp_path_factory.mktemp("made")
    tokens = torch.randint(6, 200, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    (folder / "calibration").mkdir()
    save_file({"input_ids": tokens}, folder / "calibration/tokens.safetensors")
    write_manifest(folder / "calibration")
    inputs = (project.root / "tiny", folder / "calibration", folder / "statistics")
    collect(*inputs, importance=True)
    for name, variant in settings(project).variants.items():
        quantize(name, variant, *inputs, folder / "models" / name)
        export(folder / "models" / name, "transformers", folder / "exports" / name)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "24"], "add --model"),
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--model", "hf:no/revision"], "names no revision"),
        (["--model", "tiny", "--machine", "tiny/config.json"], "is not a measurement"),
    ],
)
def test_what_cannot_be_estimated_is_one_clear_line(project: Toy, arguments: list[str], words: str) -> None:
    done = project.call("plan", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


def test_a_model_that_is_no_decoder_is_one_clear_line(project: Toy, tmp_path: Path) -> None:
    config = project.root / "bert/config.json"
    project.write("bert/config.json", json.dumps({"model_type": "bert"}))
    with pytest.raises(TaskError, match="bert") as caught:
        measure(settings(project), config, tmp_path, 0, {})
    assert len(str(caught.value).splitlines()) == 1
