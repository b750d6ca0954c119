"""Measure what a run with a model would take on this machine.

python -m tasks.planning MODEL FILE SECONDS statistics=2 quantize@int8=1 ...    # stage=threads

MODEL: a config.json, a directory with one, or hf:organisation/name@revision, of which only config.json is downloaded.
FILE: the measurement to write. SECONDS: the time limit, from the start of this process; 0 measures no times.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import psutil

from tasks.errors import TaskError
from tasks.output import write_json
from tasks.planning.need import Measurement
from tasks.program import run_stage
from tasks.settings import Settings


def measure(settings: Settings, config: Path, folder: Path, limit: float, threads: Mapping[str, int]) -> Measurement:
    """Measure the stages in `threads` for about `limit` seconds, in a temporary directory below `folder`.

    TaskError if the model is not a decoder that can be planned for.
    """
    import torch

    from tasks.hardware import cpu_cores, device_memory, peak_memory, processor_name
    from tasks.model.arrival import clean_config, known_config, read_json
    from tasks.planning.stages import Run
    from tasks.sources.choice import check_config

    values, _ = clean_config(read_json(config), untied=False)
    check_config(values, str(config))
    try:
        known = known_config(values)
        family, _ = known.model_type, (known.hidden_size, known.num_attention_heads, known.num_hidden_layers)
    except (TaskError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TaskError(f"{config} does not describe a decoder that Transformers knows: {reason}") from error
    started = psutil.Process().create_time()
    deadline = time.monotonic() + started + limit - time.time()
    with tempfile.TemporaryDirectory(prefix="measuring-", dir=folder) as work:
        run = Run(settings, known, Path(work), threads, deadline)
        needs = run.needs(measured=limit > 0)
    size, gpu = run.parameters / 1e6, torch.cuda.is_available()
    return Measurement(
        key=hashlib.sha256(f"{config.read_text(encoding='utf-8')}{settings.model_dump_json()}".encode()).hexdigest(),
        machine=processor_name(),
        device="cuda" if gpu else "cpu",
        cores=cpu_cores(),
        memory=device_memory(),
        disk=psutil.disk_usage(str(folder)).free,
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        model=f"{family}, {size / 1e3:.2f} billion" if size >= 1e3 else f"{family}, {size:.0f} million",
        parameters=run.parameters,
        took=round(time.time() - started, 1),
        held=peak_memory(),
        needs=needs,
    )


def find_config(model: str) -> Path:
    """Find the config.json of a model, downloading it if needed; TaskError if there is none."""
    path = Path(model.removeprefix("path:")).expanduser()
    try:
        if model.startswith("hf:"):
            from tasks.sources.config import fetch_config

            path = fetch_config(model) or path
        path = path / "config.json" if path.is_dir() else path
        if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError as error:
        raise TaskError(
            f"{path} does not exist; name a config.json, a directory with one, or hf:organisation/name@revision"
        ) from error
    except (OSError, ValueError) as error:
        raise TaskError(f"{model} is not a model's config.json: {' '.join(str(error).split())}") from error
    return path


def main() -> None:
    """Measure with the settings of ./params.yaml."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see Bench
    model, file, limit, *stages = sys.argv[1:]
    threads = {stage: int(count) for stage, _, count in (one.partition("=") for one in stages)}
    Path(file).parent.mkdir(parents=True, exist_ok=True)

    def work(settings: Settings) -> None:
        config = find_config(model)
        write_json(Path(file), asdict(measure(settings, config, Path(file).parent, float(limit), threads)))

    run_stage(work)


if __name__ == "__main__":
    main()
