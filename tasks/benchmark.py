"""Size, load time, memory and speed of one model in its runtime, one prompt after another, in process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from tasks.model.size import weight_bits
from tasks.runtimes import Runtime, RuntimeInfo, load_runtime
from tasks.settings import BenchmarkSettings

if TYPE_CHECKING:
    from torch import Tensor

_ASIDE = {".md", ".txt", ".yaml"}  # files that no runtime reads


@dataclass(frozen=True)
class BenchmarkReport:
    """metrics/load/TARGET/V.json: bytes, seconds, tokens per second (medians over `repeats`).

    bits_per_weight: of the exported decoder's linear layers; None if unknown for the format.
    Speeds are None if the runtime has no kernel for the format (`fast_kernel` false; `note` gives the reason).
    Ratios are relative to the baseline in the same run: medians over rounds in which the two alternate.
    """

    variant: str
    runtime: RuntimeInfo
    fast_kernel: bool
    note: str | None
    size_bytes: int
    bits_per_weight: float | None
    load_seconds: float
    peak_memory_bytes: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    time_to_first_token_seconds: float | None
    prefill_ratio: float | None
    decode_ratio: float | None


@dataclass(frozen=True)
class Speed:
    """The speed in one round: seconds to the first token; tokens per second of the prompt and of the further answer."""

    first: float
    prefill: float
    decode: float


def benchmark(name: str, settings: BenchmarkSettings, target: str, model: Path, baseline: Path) -> BenchmarkReport:
    """Load the model in its runtime and, if the runtime has a kernel for the format, time prompts and answers.

    baseline: the model to compare with, loaded as well; if it is the model itself, the ratios are 1.
    """
    started = time.perf_counter()
    runtime = load_runtime(target, model, settings.dtype)
    loaded = time.perf_counter() - started
    runtimes = [runtime] if runtime.fast else []
    if runtimes:
        warm_up(runtime, settings)
    peak = runtime.peak_memory_bytes
    if runtimes and model != baseline:
        runtimes.append(load_runtime(target, baseline, settings.dtype))
        warm_up(runtimes[-1], settings)
    rounds = alternate(runtimes, settings)
    return BenchmarkReport(
        variant=name,
        runtime=runtime.info,
        fast_kernel=runtime.fast,
        note=runtime.note,
        size_bytes=size_bytes(model),
        bits_per_weight=weight_bits(model),
        load_seconds=round(loaded, 3),
        peak_memory_bytes=peak,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch_size=settings.batch_size,
        repeats=settings.repeats,
        prefill_tokens_per_second=_median(own.prefill for own, *_ in rounds),
        decode_tokens_per_second=_median(own.decode for own, *_ in rounds),
        time_to_first_token_seconds=_median(own.first for own, *_ in rounds),
        prefill_ratio=_median(speeds[0].prefill / speeds[-1].prefill for speeds in rounds),
        decode_ratio=_median(speeds[0].decode / speeds[-1].decode for speeds in rounds),
    )


def size_bytes(model: Path) -> int:
    """The size of the files that a runtime reads."""
    return sum(p.stat().st_size for p in model.rglob("*") if p.is_file() and p.suffix not in _ASIDE)


def warm_up(runtime: Runtime, settings: BenchmarkSettings) -> None:
    """Run an untimed prompt and answer: the first use allocates memory and loads code."""
    runtime.generate_ids(_prompt(runtime, settings), settings.new_tokens)


def alternate(runtimes: Sequence[Runtime], settings: BenchmarkSettings) -> list[list[Speed]]:
    """Measure the runtimes in turn, in each of `repeats` rounds; no rounds without runtimes.

    A temporary slowdown of the machine affects a whole round, so the ratios within it stay valid.
    """
    if not runtimes:
        return []
    rounds = tqdm(range(settings.repeats), desc="rounds")
    return [[_speed(runtime, settings) for runtime in runtimes] for _ in rounds]


def _speed(runtime: Runtime, settings: BenchmarkSettings) -> Speed:
    """Decoding time is the time of a whole answer minus the time to its first token."""
    prompt = _prompt(runtime, settings)
    first = _seconds(runtime, prompt, 1)
    rest = _seconds(runtime, prompt, settings.new_tokens) - first
    return Speed(first, prompt.numel() / first, settings.batch_size * (settings.new_tokens - 1) / rest)


def _prompt(runtime: Runtime, settings: BenchmarkSettings) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch_size, settings.prompt_tokens)
    return torch.randint(len(runtime.tokenizer), shape, generator=generator)


def _seconds(runtime: Runtime, prompt: Tensor, new_tokens: int) -> float:
    started = time.perf_counter()
    runtime.generate_ids(prompt, new_tokens).cpu()
    return time.perf_counter() - started


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
