"""Measure what this machine can do, for `modelpress plan --model`: half a minute, on operations like the stages' own.

python -m tasks.planning.measure_machine [CORES]    # all of them, if not said
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from tasks.determinism import set_environment
from tasks.device import compute_device
from tasks.hardware import cpu_name, processor_name, total_memory
from tasks.output import sha256
from tasks.planning.machine import Machine, check_machine

WIDTH, TOKENS = 2048, 512  # of the products: a model of a billion weights, one sequence
SMALL, LARGE = 4 * 2**20, 40 * 2**20  # numbers: 16 MB, in a cache; 160 MB, which is given back to the system each time
FILE = 256 * 2**20  # bytes
QUIET = 15  # percent of the cores that others may use
BUSY = ", while others were at work on {:.0f}% of the cores: measure again when it is quiet"
# what any stage needs, and how long and how much that took
_STAGE = """
import tasks.scoring.lm_eval_adapter, tasks.quantizers.builtin, tasks.runtimes.transformers
import lm_eval, datasets
import transformers.models.llama.modeling_llama, psutil, time
print(psutil.Process().memory_info().rss, time.process_time())
"""


def measure(cores: int) -> Machine:
    """The machine with `cores` cores, of which all work."""
    import torch

    device = compute_device()
    torch.set_num_threads(cores)
    others = psutil.cpu_percent(1.0)
    start, base = min(_process(), _process())  # files that were never read before take several times as long
    gpu = device == "cuda"
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else total_memory()
    figures = {
        "name": machine_name(cores),
        "source": f"measured {datetime.now(UTC):%Y-%m-%d %H:%M} UTC{BUSY.format(others) if others > QUIET else ''}",
        "device": device,
        "cores": cores,
        "memory_gb": round(memory / 1e9, 1),
        "disk_gb": round(psutil.disk_usage(".").free / 1e9, 1),
        **measure_rates(device),
        **_files(device),
        "call_us": round(_call(device) * 1e6, 2),
        "layer_us": round(_layer(device) * 1e6),
        "start_s": start,
        # what a GPU's memory holds before there is a model is next to nothing
        "base_gb": 0.0 if gpu else base,
    }
    return check_machine(figures, "the measurement")


def machine_name(cores: int) -> str:
    """By which a kept measurement is told to be of this machine."""
    device = processor_name()
    return f"{device}{'' if device == cpu_name() else f' with {cpu_name()}'}, {cores} cores"


def measure_rates(device: str) -> dict[str, float]:
    """10^9 operations or bytes a second with the threads that torch has."""
    import torch

    x = torch.randn(TOKENS, WIDTH, device=device)
    weight = torch.randn(2 * WIDTH, WIDTH, device=device)
    half = (x.bfloat16(), weight.bfloat16())
    integers = [torch.randint(-128, 127, t.shape, dtype=torch.int8, device=device) for t in (x, weight)]
    product = 2 * x.numel() * len(weight)
    gram = weight.T @ weight + WIDTH * torch.eye(WIDTH, device=device)
    small, large = torch.randn(SMALL, device=device), torch.randn(LARGE, device=device)
    row = torch.randn(1, 8192, device=device)
    streamed = large.view(-1, 8192)
    linear = torch.nn.functional.linear
    work: dict[str, tuple[float, Callable[[], Any]]] = {
        "product_gflops": (product, lambda: linear(x, weight)),
        "half_gflops": (product, lambda: linear(*half)),
        "integer_gflops": (product, lambda: torch._int_mm(integers[0], integers[1].T)),
        "factor_gflops": (4 / 3 * WIDTH**3, lambda: _factor(gram)),
        "memory_gbs": (8 * SMALL, lambda: small.mul_(1.0)),
        "fresh_gbs": (8 * LARGE, lambda: large * 1.0),
        "stream_gbs": (4 * LARGE, lambda: linear(row, streamed)),
    }
    return {name: round(amount / _seconds(run, device) / 1e9, 2) for name, (amount, run) in work.items()}


def _factor(gram: Any) -> Any:
    import torch

    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True)


def _call(device: str) -> float:
    """Seconds of one operation on next to nothing."""
    import torch

    row = torch.randn(64, device=device)

    def calls() -> None:
        for _ in range(200):
            row.mul_(1.0)

    return _seconds(calls, device) / 200


def _layer(device: str) -> float:
    """Seconds that a decoder layer takes for one token of a model with next to no weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = 16
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=1, vocab_size=64
    )
    model: Any = LlamaForCausalLM(config).eval().to(device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.inference_mode():
        return _seconds(lambda: model(ids, use_cache=False), device) / layers


def _clock(device: str) -> Callable[[], float]:
    """Of one thread the processor's own time, which others at work do not lengthen."""
    import torch

    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _seconds(work: Callable[[], object], device: str) -> float:
    """The median of several runs, after one that pays for memory and code paths: what a stage will see."""
    import torch

    clock = _clock(device)

    def once() -> float:
        started = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    once()
    times = [once() for _ in range(3)]
    while sum(times) < 0.6:
        times.append(once())
    return statistics.median(times)


def _process() -> tuple[float, float]:
    """Seconds of the processor until a process has imported what a stage needs, and 10^9 bytes that it then holds."""
    done = subprocess.run([sys.executable, "-c", _STAGE], check=True, capture_output=True, text=True)
    held, seconds = done.stdout.split()[-2:]
    return round(float(seconds), 1), round(int(held) / 1e9, 2)


def _files(device: str) -> dict[str, float]:
    """10^9 bytes a second: written and forced to the disk, read again, hashed."""
    clock, block = _clock(device), os.urandom(2**20)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "file"
        started = clock()
        with path.open("wb") as file:
            for _ in range(FILE // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = clock()
        with path.open("rb") as file:
            while file.read(2**20):
                pass
        was_read = clock()
        sha256(path)
        hashed = clock()
    spans = {
        "disk_write_gbs": written - started,
        "disk_read_gbs": was_read - written,
        "hash_gbs": hashed - was_read,
    }
    return {name: round(FILE / span / 1e9, 3) for name, span in spans.items()}


def main() -> None:
    """Print the machine's figures as YAML."""
    set_environment()
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = int(sys.argv[1]) if len(sys.argv) > 1 else here
    print(yaml.safe_dump(measure(cores).model_dump(mode="json"), sort_keys=False))


if __name__ == "__main__":
    main()
