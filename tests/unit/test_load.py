"""The load stage: one report for targets with and without a server, and for variants that are not served."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import tasks.load
import tasks.loadtest.measure
from tasks.benchmark import BenchmarkReport
from tasks.errors import TaskError
from tasks.load import describe, load
from tasks.loadtest.figures import Load, figures
from tasks.loadtest.measure import Measured, measure
from tasks.loadtest.records import Request, Run
from tasks.loadtest.trial import Trial
from tasks.output import write_json
from tasks.runtimes import RuntimeInfo
from tasks.serving.engines import ENGINES
from tasks.serving.process import NotServableHere, NotServed
from tasks.settings import Settings, check_settings

SETTINGS: Settings = check_settings(yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8")))


def run(each: float, failures: tuple[str, ...] = ()) -> Run:
    """Four requests of 3 tokens, 0.25 s to the first and `each` for the others."""
    request = Request(0.25, (each, each), 0.25 + 2 * each, 128, 3)
    return Run(4, 2.0 * each, (request,) * 4, failures, 0.1, 0.9)


def loaded(compared: bool = True, failures: tuple[str, ...] = ()) -> Load:
    pairs = tuple((run(0.05 + turn / 1000), run(0.1 + turn / 500))[: 1 + compared] for turn in range(5))
    trial = Trial(pairs, (run(0.05, failures),), (run(0.1),) if compared else ())
    return figures(trial, SETTINGS.load, "generator 1", None if compared else "not compared under load: too large")


def measured(**changes: Any) -> Measured:
    whole = Measured("vLLM", "0.32.0", ["python", "-m", "vllm"], "bfloat16", 70.5, 2_000_000, loaded())
    return replace(whole, **changes)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An exported variant of 1,000 bytes, and a machine that is described without a GPU."""
    folder = tmp_path / "int8"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    monkeypatch.setattr(tasks.load, "weight_bits", lambda _: 8.0)
    monkeypatch.setattr(tasks.load, "nvidia_gpu", lambda: False)
    return folder


def measured_as(monkeypatch: pytest.MonkeyPatch, result: Measured | Exception) -> None:
    def fake(*_: object) -> Measured:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(tasks.load, "measure", fake)


def loads(model: Path, name: str = "int8") -> tasks.load.LoadReport:
    return load(name, "vllm", SETTINGS, model, model.parent / "base", model.parent / "logs")


def test_the_speeds_of_a_served_target_come_from_the_load_test(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, measured())
    report = loads(model)
    assert (report.runtime.name, report.runtime.version, report.runtime.dtype) == ("vLLM", "0.32.0", "bfloat16")
    assert (report.size_bytes, report.load_seconds, report.peak_memory_bytes) == (1000, 70.5, 2_000_000)
    assert report.prefill_tokens_per_second == 128 / 0.25
    assert report.decode_tokens_per_second == pytest.approx(1 / 0.052)
    assert report.decode_ratio == pytest.approx(2.0, rel=1e-4)  # half the time for a token
    assert report.prefill_ratio == 1.0
    assert report.fast_kernel
    assert report.note is None
    assert report.load is not None
    assert report.load.ratios is not None
    assert report.load.ratios["time_per_token"].high < 0.51
    assert json.loads(json.dumps(asdict(report)))["load"]["curve"][0]["concurrency"] == 4
    assert describe(report).startswith("0.0 MB, ")
    assert "2.00 times the baseline's" in describe(report)


def test_the_line_tells_of_failed_requests(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, measured(load=loaded(failures=("closed", "closed"))))
    assert describe(loads(model)).endswith("; 2 requests failed: closed")


def test_a_variant_that_could_not_be_compared(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, measured(load=loaded(compared=False)))
    report = loads(model)
    assert (report.decode_ratio, report.prefill_ratio) == (None, None)
    assert report.note == "not compared under load: too large"
    base = loads(model, "base")
    assert (base.decode_ratio, base.prefill_ratio) == (1.0, 1.0)


@pytest.mark.parametrize("error", [NotServed("vLLM ended with status 1", "no kernel"), NotServableHere("no AMX")])
def test_a_variant_that_is_not_served_has_no_speeds(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: NotServed | NotServableHere
) -> None:
    measured_as(monkeypatch, error)
    monkeypatch.setitem(ENGINES, "vllm", lambda: SimpleNamespace(name="vLLM", version=lambda: "0.32.0"))
    report = loads(model)
    assert (report.load, report.command, report.decode_tokens_per_second, report.decode_ratio) == (None,) * 4
    assert not report.fast_kernel
    assert report.note == error.reason
    with pytest.raises(type(error)):
        loads(model, "base")


def test_a_target_without_a_server_is_measured_in_this_process(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RuntimeInfo("Transformers", "5", "cpu", "float32", 2, "processor")
    found = BenchmarkReport("int8", runtime, True, None, 9, 8.0, 1.0, 7, 128, 32, 1, 5, 10.0, 20.0, 0.1, 1.5, 2.5)
    monkeypatch.setattr(tasks.load, "benchmark", lambda *_: found)
    report = load("int8", "transformers", SETTINGS, model, model, model)
    assert {key: value for key, value in asdict(report).items() if key not in ("command", "load")} == asdict(found)
    assert (report.command, report.load) == (None, None)
    assert describe(report) == "0.0 MB, 20.0 tokens/s"


def test_a_baseline_for_which_no_memory_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variant is measured alone, and the note has the figures."""
    started: list[str] = []

    class Served:
        def __init__(self, _target: str, _folder: Path, name: str, *_: object, **more: Any) -> None:
            started.append(name)
            # 4 texts of this length hold 32 requests of 160 tokens, and some to spare
            assert more["context"] == 168 * 32 // 4
            assert more["extra"] == ()

        def __enter__(self) -> SimpleNamespace:
            return SimpleNamespace(
                engine="vLLM", version="1", command=[], start_seconds=1.0, peak_memory_bytes=lambda: 3_000_000_000
            )

        def __exit__(self, *_: object) -> None:
            return

    for name in ("int8", "base"):
        write_json(tmp_path / name / "config.json", {"max_position_embeddings": 8192, "dtype": "bfloat16"})
    module = tasks.loadtest.measure
    monkeypatch.setattr(module, "served", Served)
    monkeypatch.setattr(module, "nvidia_gpu", lambda: False)
    monkeypatch.setattr(module, "available_memory", lambda: 1_000_000_000)
    monkeypatch.setattr(module, "_load", lambda servers, _t, _s, _l, note: (len(servers), note))
    found = measure("vllm", "int8", tmp_path / "int8", tmp_path / "base", SETTINGS.load, tmp_path / "logs")
    alone: Any = found.load
    assert started == ["int8"]
    assert alone == (
        1,
        "not compared under load: the baseline's server needs about 3.0 GB beside the variant's, and 1.0 GB are free",
    )
    assert found.dtype == "bfloat16"
    monkeypatch.setattr(module, "available_memory", lambda: 4_000_000_000)
    both: Any = measure("vllm", "int8", tmp_path / "int8", tmp_path / "base", SETTINGS.load, tmp_path / "logs").load
    assert both == (2, None)
    write_json(tmp_path / "int8" / "config.json", {"max_position_embeddings": 100})
    with pytest.raises(TaskError, match=r"^load\.prompt_tokens and new_tokens are together 160, but"):
        measure("vllm", "int8", tmp_path / "int8", tmp_path / "base", SETTINGS.load, tmp_path / "logs")
