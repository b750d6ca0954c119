"""The statistics stage: the activation statistics for all quantization methods, from one pass.

python -m tasks.statistics

A safetensors file for each decoder layer and one for the output layer hold, for each distinct input (q, k and v share
one), the Gram matrix X^T X and the largest and mean magnitude by channel. The model runs layer by layer; memory holds
one layer's weights, its statistics and the activations. Tokens may be weighted (importance.py).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.activations.memory import needed_bytes
from tasks.activations.plain import collect_plain
from tasks.device import compute_device, fast_dtype
from tasks.hardware import current_memory, peak_memory
from tasks.output import checksums, resumable_directory, write_json
from tasks.program import run_stage
from tasks.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.model.decoder import Decoder


@dataclass(frozen=True)
class StatisticsReport:
    """metrics/statistics.json. dtype: of the model's matrix products; all else is float32. estimate: see
    `estimate_bytes`."""

    tokens: int
    layers: int
    dtype: str
    device: str
    seconds: float
    bytes: int
    estimate_bytes: int
    peak_memory_bytes: int


def collect(model: Path, calibration: Path, destination: Path, importance: bool) -> StatisticsReport:
    """Run the model over the calibration tokens; write `layers.N.safetensors` for each layer, `lm_head.safetensors`.

    importance: weight the tokens in the layers' Gram matrices by Fisher information (activations/importance.py).
    An interrupted run resumes at its layer. TaskError if the model has no decoder layers in safetensors files.
    """
    import torch
    from safetensors.torch import load_file

    from tasks.activations.importance import collect_weighed
    from tasks.model.decoder import Decoder

    started = time.monotonic()
    device = compute_device()
    decoder = Decoder(model, torch.float32, device, fast_dtype(device))
    tokens = load_file(calibration / "tokens.safetensors")["input_ids"]
    estimate = estimate_bytes(decoder, tokens, importance)
    print(f"needs about {estimate / 1e9:.1f} GB of memory", flush=True)
    with resumable_directory(destination, _key(model, calibration, decoder, importance)) as work:
        if importance:
            collect_weighed(decoder, tokens, work)
        else:
            collect_plain(decoder, tokens, work)
        size = sum(path.stat().st_size for path in work.iterdir())
    return StatisticsReport(
        tokens=tokens.numel(),
        layers=len(decoder),
        dtype=str(decoder.products).removeprefix("torch."),
        device=device,
        seconds=round(time.monotonic() - started, 1),
        bytes=size,
        estimate_bytes=estimate,
        peak_memory_bytes=peak_memory(),
    )


def estimate_bytes(decoder: Decoder, tokens: Tensor, importance: bool) -> int:
    """The estimated peak memory of `collect`, in bytes: the process's current memory plus `needed_bytes`."""
    hidden, inner, vocabulary = decoder.widths
    widths = (hidden, hidden, hidden, inner)
    return current_memory() + needed_bytes(
        tokens.numel(),
        tokens.shape[1],
        widths,
        vocabulary,
        decoder.layer_parameters,
        importance,
        decoder.device,
        decoder.products.itemsize,
    )


def _key(model: Path, calibration: Path, decoder: Decoder, importance: bool) -> str:
    """The key of all inputs of the statistics."""
    import torch
    import transformers

    parts = [torch.__version__, transformers.__version__, decoder.device, str(decoder.products), str(importance)]
    parts += [checksum for folder in (model, calibration) for checksum in sorted(checksums(folder).values())]
    return "\n".join(parts)


def main() -> None:
    """Run the stage on the model and the calibration tokens in the current directory."""

    def work(settings: Settings) -> None:
        importance = settings.statistics.importance
        report = collect(Path("models/source"), Path("data/calibration"), Path("data/statistics"), importance)
        write_json(Path("metrics/statistics.json"), asdict(report))
        print(f"{report.layers} layers, {report.tokens:,} tokens, {report.bytes / 1e6:.0f} MB, {report.seconds} s")

    run_stage(work)


if __name__ == "__main__":
    main()
