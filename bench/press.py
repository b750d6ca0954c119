"""Run one contender in its own process: quantize, and print seconds and peak memory as JSON.

python -m bench.press statistics FOLDER
python -m bench.press "gptq, modelpress" FOLDER STATISTICS
python -m bench.press quality FOLDER ITEMS
python -m bench.press decode STATISTICS "awq, modelpress" ...
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.contenders import CONTENDERS, DECODING, Contender
from tasks.determinism import set_environment
from tasks.device import compute_device
from tasks.hardware import peak_memory
from tasks.program import PARAMS
from tasks.settings import BASE, Settings, check_settings, load_settings

ROUNDS = 7  # of the decoding benchmark
BESIDE = ("tokenizer*", "generation_config.json")  # files needed by an engine besides weights and configuration
MODEL, CALIBRATION, RAW = Path("models/source"), Path("data/calibration"), Path("data/raw")


def statistics(folder: Path) -> dict[str, Any]:
    """Run the pass shared by all variants of our quantizer."""
    from tasks.statistics import collect

    report = collect(MODEL, CALIBRATION, folder, load_settings(PARAMS).statistics.importance)
    return {"seconds": report.seconds, "peak_memory_bytes": report.peak_memory_bytes}


def press(contender: Contender, folder: Path, known: Path) -> dict[str, Any]:
    """Write the model to `folder`; seconds exclude imports and checks."""
    from safetensors.torch import load_file

    from tasks import quantizers

    variant = check_settings(changed(load_settings(PARAMS), contender)).variant(contender.variant)
    if contender.published:
        from awq.quantize.quantizer import AwqQuantizer

        from tasks.quantizers.libraries import autoawq

        autoawq.GramAwqQuantizer = AwqQuantizer  # type: ignore[misc]
    tokens = load_file(CALIBRATION / "tokens.safetensors")["input_ids"]
    started = time.monotonic()
    quantizers.press(quantizers.QuantizeJob(MODEL, tokens, known, variant, compute_device(), folder))
    seconds = time.monotonic() - started
    _complete(folder)
    return {"seconds": round(seconds, 1), "peak_memory_bytes": peak_memory()}


def quality(folder: Path, items: int) -> dict[str, Any]:
    """Evaluate with `items` items per task."""
    from tasks.evaluate import evaluate
    from tasks.model.size import weight_bits
    from tasks.reference import measure_reference
    from tasks.scoring.evaluation import Job

    settings = load_settings(PARAMS).evaluation
    job = Job(settings.model_copy(update={"limit": items}), "transformers", folder)
    with tempfile.TemporaryDirectory() as place:
        results = Path(place) / "results"
        if folder == MODEL:
            report = measure_reference(job, results)
        else:
            report = evaluate(folder.name, job, MODEL, None, None, results)
    texts = {text: {"perplexity": t.perplexity, "kl": t.kl, "top1": t.top1} for text, t in report.texts.items()}
    return {"texts": texts, "score": report.mean_score, "bits_per_weight": weight_bits(folder)}


def decode(known: Path, names: Sequence[str]) -> dict[str, Any]:
    """Measure decoding in ONNX Runtime GenAI with the contenders' variants and the float32 baseline.

    The variants are quantized again, with an 8-bit output layer (`DECODING`). Alternating rounds; tokens per second:
    medians; ratio: median of the ratios to the baseline in the same round.
    """
    from tasks.benchmark import alternate, warm_up
    from tasks.exporters.onnx.graph import export_onnx
    from tasks.runtimes import load_runtime

    settings = load_settings(PARAMS)
    asked = settings.benchmark.model_copy(update={"repeats": ROUNDS})
    with tempfile.TemporaryDirectory() as place:
        models = {BASE: MODEL} | {name: Path(place) / "pressed" / name for name in names}
        runtimes = {}
        for name, model in models.items():
            if name != BASE:
                model.mkdir(parents=True)
                one = find(name)
                press(replace(one, changes={**one.changes, **DECODING}), model, known)
            target = Path(place) / "exported" / name
            target.mkdir(parents=True)
            export_onnx(model, target)
            _complete(target)
            runtimes[name] = load_runtime("onnx", target, asked.dtype)
            warm_up(runtimes[name], asked)
        found = alternate(list(runtimes.values()), asked)
    rounds = [{name: speed.decode for name, speed in zip(runtimes, speeds, strict=True)} for speeds in found]
    return {
        "tokens_per_second": {name: round(median(one[name] for one in rounds), 1) for name in runtimes},
        "ratio": {name: round(median(one[name] / one[BASE] for one in rounds), 2) for name in names},
    }


def _complete(folder: Path) -> None:
    """Add the files that an engine needs besides the weights."""
    for pattern in BESIDE:
        for file in MODEL.glob(pattern):
            shutil.copy(file, folder / file.name)


def find(name: str) -> Contender:
    """Return the contender `name`."""
    return next(one for one in CONTENDERS if one.name == name)


def changed(settings: Settings, contender: Contender) -> dict[str, Any]:
    """The settings for the contender: params.yaml with the changes to its variant."""
    values = settings.model_dump(exclude_unset=True)
    values["variants"][contender.variant] |= contender.changes
    return values


def main() -> None:
    """Run the command line's subcommand."""
    set_environment()
    what, folder = sys.argv[1], Path(sys.argv[2])
    match what:
        case "statistics":
            found = statistics(folder)
        case "quality":
            found = quality(folder, int(sys.argv[3]))
        case "decode":
            found = decode(folder, sys.argv[3:])
        case _:
            found = press(find(what), folder, Path(sys.argv[3]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
