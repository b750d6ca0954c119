"""The measurement in process: ratios are robust to a temporary slowdown, and memory is the variant's only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tasks.benchmark
from tasks.benchmark import BenchmarkReport, benchmark
from tasks.runtimes import RuntimeInfo
from tasks.settings import BenchmarkSettings

SETTINGS = BenchmarkSettings(dtype="float32", prompt_tokens=10, new_tokens=5, batch_size=2, repeats=3)
LAPS = (1.0, 4.0, 0.5)  # the machine's slowdown by round
PROMPT, TOKEN = 8.0, 2.0  # the baseline's seconds for a prompt with its first token, and for each further token

Measure = Callable[..., tuple[BenchmarkReport, list[str]]]


class Machine:
    """A fake clock, a log of work, and models that advance the clock."""

    def __init__(self, slower: dict[str, float], fast: bool) -> None:
        self.now, self.done, self.slower, self.fast = 0.0, list[str](), slower, fast

    def load(self, _target: str, directory: Path, _dtype: str) -> Any:
        name = directory.name
        self.done.append(f"load {name}")

        def generate(ids: Tensor, new_tokens: int) -> Tensor:
            answers = [did for did in self.done if did == f"answer {name}"]
            lap = LAPS[max(0, len(answers) - 1)] if answers else 1.0
            if new_tokens > 1:
                self.done.append(f"answer {name}")
            self.now += lap * self.slower[name] * (PROMPT + TOKEN * (new_tokens - 1))
            return torch.cat([ids, ids[:, :1].repeat(1, new_tokens)], 1)

        about = RuntimeInfo("engine", "1", "cpu", "float32", 2, "processor")
        return Loaded(self, generate_ids=generate, fast=self.fast, note=None, info=about, tokenizer=range(100))


class Loaded(SimpleNamespace):
    """A model on a fake machine."""

    def __init__(self, machine: Machine, **values: Any) -> None:
        super().__init__(**values)
        self._machine = machine

    @property
    def peak_memory_bytes(self) -> int:
        self._machine.done.append("memory")
        return 7


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    def measured(name: str = "int8", *, slower: float = 0.5, fast: bool = True) -> tuple[BenchmarkReport, list[str]]:
        machine = Machine({"base": 1.0, "int8": slower}, fast)
        monkeypatch.setattr(tasks.benchmark, "load_runtime", machine.load)
        monkeypatch.setattr(tasks.benchmark, "weight_bits", lambda _: 8.0)
        monkeypatch.setattr("tasks.benchmark.time.perf_counter", lambda: machine.now)
        return benchmark(name, SETTINGS, "engine", tmp_path / name, tmp_path / "base"), machine.done

    return measured


def test_ratios_are_robust_to_a_temporary_slowdown(measure: Measure) -> None:
    report, _ = measure()
    assert (report.prefill_ratio, report.decode_ratio) == (2.0, 2.0)
    # the median round has no slowdown
    assert report.time_to_first_token_seconds == PROMPT / 2
    assert report.prefill_tokens_per_second == 20 / (PROMPT / 2)
    assert report.decode_tokens_per_second == 2 * 4 / (4 * TOKEN / 2)


def test_models_alternate_after_an_untimed_warm_up_of_each(measure: Measure) -> None:
    report, done = measure()
    assert done == [
        *("load int8", "answer int8", "memory", "load base", "answer base"),
        *["answer int8", "answer base"] * SETTINGS.repeats,
    ]
    assert report.peak_memory_bytes == 7


def test_the_baseline_is_not_compared_with_itself(measure: Measure) -> None:
    report, done = measure("base")
    assert (report.prefill_ratio, report.decode_ratio) == (1.0, 1.0)
    assert done.count("load base") == 1
    assert done.count("answer base") == 1 + SETTINGS.repeats


def test_no_speed_without_a_kernel(measure: Measure) -> None:
    report, done = measure(fast=False)
    assert (report.decode_tokens_per_second, report.prefill_ratio, report.decode_ratio) == (None, None, None)
    assert done == ["load int8", "memory"]
