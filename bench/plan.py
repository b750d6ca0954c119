"""`python -m bench.plan`: compare the estimates of `modelpress plan --model` with the stages themselves.

python -m bench.plan --model models/source --calibration data/calibration --raw data/raw    # 15 minutes for 135M
python -m bench.plan --only statistics --only int8 --only gptq-int4          # a random model of 1 billion: 20 minutes

The estimate is `python -m tasks.planning` with its usual time limit. Then each stage runs as a program, scoring all
evaluation items, with the cores that a flow would give it. Measure on a quiet machine. The result is added to
bench/results/plan.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from flows.graph.schedule import threads_of
from flows.planning import LAST, SECONDS
from tasks.output import write_json
from tasks.planning.need import read_measurement
from tasks.program import PARAMS
from tasks.reporting.provenance import versions
from tasks.settings import BASE, load_settings

JOBS = 2  # stages at a time
RESULTS = Path("bench/results/plan.json")
# torch in a process of its own: a child's peak of memory begins where its parent's is
_MODEL = """
import sys
from pathlib import Path
from transformers import LlamaConfig
from tasks.planning.miniature import Miniature
width, layers, words = map(int, sys.argv[1:])
config = LlamaConfig(hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, vocab_size=words,
                     num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 256))
Miniature(Path("models"), config, "bfloat16").model.rename("models/source")
"""
_TOKENS = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tasks.output import write_manifest
words = json.loads(Path("models/source/config.json").read_text())["vocab_size"]
folder = Path("data/calibration")
folder.mkdir()
save_file({"input_ids": torch.randint(words, (int(sys.argv[1]), 512))}, folder / "tokens.safetensors")
write_manifest(folder)
"""


def main(
    model: Annotated[Path | None, typer.Option(help="A model's folder; a random one is made if not given.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Its calibration tokens; random ones if not given.")] = None,
    raw: Annotated[Path | None, typer.Option(help="Evaluation data: evaluate and benchmark run as well.")] = None,
    width: Annotated[int, typer.Option(help="Channels of the random model; a multiple of 256.")] = 2048,
    layers: Annotated[int, typer.Option(help="Decoder layers of the random model.")] = 16,
    words: Annotated[int, typer.Option(help="Words of the random model.")] = 65536,
    samples: Annotated[int, typer.Option(min=1, help="Random sequences of calibration, of 512 tokens.")] = 4,
    only: Annotated[list[str] | None, typer.Option(help="statistics, which all need, or a variant.")] = None,
    results: Annotated[Path, typer.Option(help="The file that the result joins.")] = RESULTS,
) -> None:
    """Estimate and run the stages of params.yaml that compute, and compare."""
    os.environ["PYTHONPATH"] = os.getcwd()
    values = load_settings(PARAMS).model_dump(exclude_unset=True, mode="json")
    values["gate"] |= {"sequential": False}  # the estimate is for all items
    names = [name for name in values["variants"] if not only or name in (*only, BASE)]
    values["variants"] = {name: values["variants"][name] for name in names}
    with tempfile.TemporaryDirectory(prefix="modelpress-plan-") as name:
        folder = Path(name)
        for part in ("models", "data"):
            (folder / part).mkdir()
        for given, place in ((model, "models/source"), (calibration, "data/calibration"), (raw, "data/raw")):
            if given:
                (folder / place).symlink_to(given.resolve())
        (folder / "evals").symlink_to(Path("evals").resolve())
        if not model:
            _python(folder, "-c", _MODEL, *map(str, (width, layers, words)))
        if not calibration:
            _python(folder, "-c", _TOKENS, str(samples))
            values["calibration"] |= {"samples": samples, "sequence_length": 512}
        (folder / PARAMS).write_text(yaml.safe_dump(values), encoding="utf-8")
        found = compare(folder, names, ("export", "reference", "evaluate", "benchmark") if raw else ())
    kept = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    write_json(results, kept | found)


def compare(folder: Path, names: list[str], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Estimate and run the stages in `folder`; the result, by the model's name."""
    stages = [f"quantize@{BASE}", "statistics"]
    for kind in ("quantize", *kinds):
        stages += [kind] if kind == "reference" else [f"{kind}@{name}" for name in names]
    stages = list(dict.fromkeys(stages))
    cores = os.cpu_count() or 1
    threads = {stage: threads_of(stage, (), (stage,), JOBS, cores) for stage in stages}
    asked = [f"{stage}={count}" for stage, count in threads.items()]
    _python(folder, "-m", "tasks.planning", "models/source", "plan.json", str(SECONDS - LAST), *asked)
    estimate = read_measurement(folder / "plan.json")
    print(f"estimated in {estimate.took:.0f} s, holding {estimate.held / 1e9:.1f} GB", flush=True)
    rows, start = [], 0.0
    for stage in stages:
        module, _, name = stage.partition("@")
        os.environ["OMP_NUM_THREADS"] = str(threads[stage])
        began = time.perf_counter()
        _python(folder, "-m", f"tasks.{module}", *([name] if name else []))
        seconds, need = time.perf_counter() - began - start, estimate.needs[stage]
        if stage == f"quantize@{BASE}":  # only starts and links; a run forks its stages and does not pay for the start
            start = seconds
        report = folder / f"metrics/{'reference/base' if stage == 'reference' else stage.replace('@', '/')}.json"
        memory = json.loads(report.read_text(encoding="utf-8"))["peak_memory_bytes"] if report.exists() else None
        written = folder / (f"models/{name}" if name else f"data/{module}")
        disk = sum(path.stat().st_size for path in written.glob("*.safetensors"))
        rows.append({"stage": stage, "estimated": asdict(need), "seconds": seconds, "memory": memory, "disk": disk})
        ratio = f"{need.seconds:.1f} / {seconds:.1f} s = {need.seconds / seconds:.2f}" if need.seconds else need.note
        print(
            f"{stage:<22}{ratio}{' rough' * need.rough}   memory {need.memory / 1e9:.2f} / {(memory or 0) / 1e9:.2f} GB"
            + (f"   disk {need.disk / 1e6:.1f} / {disk / 1e6:.1f} MB" if need.disk else ""),
            flush=True,
        )
    about = {"machine": estimate.machine, "when": estimate.when, "versions": versions(), "took": estimate.took}
    return {estimate.model: about | {"stages": rows}}


def _python(folder: Path, *arguments: str) -> str:
    """What a Python process in `folder` prints; it ends the whole if it fails."""
    command = [sys.executable, *arguments]
    done: Any = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        sys.exit(f"{' '.join(arguments[:3])} failed: {said[-1] if said else 'no word'}")
    return str(done.stdout)


if __name__ == "__main__":
    typer.run(main)
