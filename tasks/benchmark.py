"""The benchmark stage: size, load time, memory and speed of one model in its runtime.

python -m tasks.benchmark int8
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tasks.device import peak_memory
from tasks.output import write_json
from tasks.program import one_argument, run_stage
from tasks.runtimes import About, Runtime, load_runtime
from tasks.settings import BenchmarkSettings, Settings
from tasks.size import weight_bits

_ASIDE = {".md", ".txt", ".yaml"}  # what no runtime reads


@dataclass(frozen=True)
class BenchmarkReport:
    """metrics/benchmark/V.json: bytes, seconds, tokens a second (medians over `repeats`).

    bits_per_weight: of the decoder's linear layers as they are shipped; None where the format does not tell.
    Speeds are None where the runtime has no kernel for the format (`fast_kernel` false; `note` says why).
    """

    variant: str
    runtime: About
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


def benchmark(name: str, settings: BenchmarkSettings, target: str, model: Path) -> BenchmarkReport:
    """Load the model in its runtime and, where that has a kernel for the format, time prompts and answers."""
    started = time.perf_counter()
    runtime = load_runtime(target, model, settings.dtype)
    loaded = time.perf_counter() - started
    speed = speeds(runtime, settings) if runtime.fast else {}
    return BenchmarkReport(
        variant=name,
        runtime=runtime.about,
        fast_kernel=runtime.fast,
        note=runtime.note,
        size_bytes=sum(p.stat().st_size for p in model.rglob("*") if p.is_file() and p.suffix not in _ASIDE),
        bits_per_weight=weight_bits(model),
        load_seconds=round(loaded, 3),
        peak_memory_bytes=peak_memory(runtime.about.device),
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch_size=settings.batch_size,
        repeats=settings.repeats,
        prefill_tokens_per_second=speed.get("prefill"),
        decode_tokens_per_second=speed.get("decode"),
        time_to_first_token_seconds=speed.get("first"),
    )


def speeds(runtime: Runtime, settings: BenchmarkSettings) -> dict[str, float]:
    """Seconds to the first token, tokens a second of the prompt and of the answer: medians over the repeats.

    Decoding is a whole answer less the time to its first token.
    """
    import torch

    vocabulary = len(runtime.tokenizer)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (settings.batch_size, settings.prompt_tokens), generator=generator)
    runtime.generate_ids(prompt, 2)  # the first use pays for memory and code paths
    first, rest = [], []
    for _ in tqdm(range(settings.repeats), desc="repeats"):
        first.append(_seconds(runtime, prompt, 1))
        rest.append(_seconds(runtime, prompt, settings.new_tokens) - first[-1])
    to_first, to_last = statistics.median(first), statistics.median(rest)
    return {
        "first": to_first,
        "prefill": prompt.numel() / to_first,
        "decode": settings.batch_size * (settings.new_tokens - 1) / to_last,
    }


def _seconds(runtime: Runtime, prompt: Any, new_tokens: int) -> float:
    started = time.perf_counter()
    runtime.generate_ids(prompt, new_tokens).cpu()
    return time.perf_counter() - started


def main() -> None:
    """Benchmark the variant that the command line names, in the current directory."""
    name = one_argument("python -m tasks.benchmark VARIANT")

    def work(settings: Settings) -> None:
        settings.variant(name)
        report = benchmark(name, settings.benchmark, settings.target, Path("exports") / name)
        write_json(Path(f"metrics/benchmark/{name}.json"), asdict(report))
        speed = report.decode_tokens_per_second
        print(f"{name}: {report.size_bytes / 1e6:.1f} MB, {f'{speed:.1f} tokens/s' if speed else report.note}")

    run_stage(work)


if __name__ == "__main__":
    main()
