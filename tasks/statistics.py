"""The statistics stage: what every quantization method needs to know of the model's activations, from one pass.

python -m tasks.statistics

For each decoder layer a safetensors file, for each distinct input in it (q, k and v read the same one): its Gram matrix
X^T X, its largest and its mean magnitude by channel; one more for the output layer. The model runs layer by layer; one
layer's weights, its statistics and the activations are in memory. Tokens may be weighed (importance.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from tasks.device import compute_device, current_memory, fast_dtype, peak_memory
from tasks.errors import TaskError
from tasks.output import checksums, resumable_directory, write_json
from tasks.program import run_stage
from tasks.settings import Settings
from tasks.weights import save

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.decoder import Decoder

STATE, DONE = "state.safetensors", "done"  # what the next layer reads, while there is one
OUTPUT = "lm_head"  # the output layer, by its name in transformers
PREDICTED = 128  # tokens whose predictions importance.py holds at once; here, where nothing imports torch


@dataclass(frozen=True)
class Input:
    """What is known of a linear layer's inputs X, over all calibration tokens.

    gram: X^T X, float32 [channels, channels], its tokens weighed if that was asked for. largest, mean: of the
    magnitudes, float32 [channels].
    """

    gram: Tensor
    largest: Tensor
    mean: Tensor


@dataclass(frozen=True)
class StatisticsReport:
    """metrics/statistics.json. dtype: of the model's matrix products; what is between them, and the sums, is float32.
    estimate: see `estimate_bytes`."""

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

    importance: weigh the tokens in the layers' Gram matrices by how much hangs on them (tasks/importance.py).
    A run that was interrupted goes on at its layer. TaskError if the model has no decoder layers in safetensors files.
    """
    import torch
    from safetensors.torch import load_file

    from tasks.decoder import Decoder
    from tasks.importance import collect_weighed

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
            _collect_plain(decoder, tokens, work)
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
    """The memory that `collect` will hold at most, bytes: what the process holds now, and `needed_bytes`."""
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


def needed_bytes(
    tokens: int,
    sequence_length: int,
    widths: Sequence[int],
    vocabulary: int,
    layer_parameters: int,
    importance: bool,
    device: str,
    product: int,
) -> int:
    """The memory, bytes, that the pass takes beyond what the process holds: all activations twice, and the most of

    - the embedding, as it is stored and as float32,
    - one layer's weights as they are stored and as they are multiplied with, its Gram matrices, and what one sequence
      passes through inside the layer,
    - where tokens are weighed, the output layer as those, and the predictions of `PREDICTED` tokens five times over.

    Where tokens are weighed, what a sequence leaves inside a layer for the way back comes on top, for the process does
    not give it back: three times what it passes through. What is stored is in the processor's memory: on a GPU, whose
    memory is meant there, it does not count.

    widths: of the distinct inputs in a layer; the first is that of the layer itself. product: bytes of a weight in a
    matrix product.
    """
    hidden, inner = widths[0], max(widths)
    activations = tokens * hidden
    sequence = sequence_length * (3 * inner + 8 * hidden)
    grams = sum(width**2 for width in widths)
    stored = 0 if device == "cuda" else 2
    weight = stored + product
    most = max((stored + 4) * vocabulary * hidden, weight * layer_parameters + 4 * (grams + sequence))
    if importance:
        most = max(most, weight * vocabulary * hidden + 20 * PREDICTED * vocabulary) + 12 * sequence
    return int(8 * activations + most)


def statistics_file(directory: Path, layer: int | None) -> Path:
    """Where the statistics of decoder layer `layer` are kept; None: those of the output layer."""
    return directory / (f"{OUTPUT}.safetensors" if layer is None else f"layers.{layer}.safetensors")


def _key(model: Path, calibration: Path, decoder: Decoder, importance: bool) -> str:
    """What the statistics depend on."""
    import torch
    import transformers

    parts = [torch.__version__, transformers.__version__, decoder.device, str(decoder.products), str(importance)]
    parts += [checksum for folder in (model, calibration) for checksum in sorted(checksums(folder).values())]
    return "\n".join(parts)


def _collect_plain(decoder: Decoder, tokens: Tensor, work: Path) -> None:
    """Every layer once over all tokens, one sequence at a time: it stays in a CPU's cache."""
    import torch

    from tasks.sums import listening, save_output_sums, save_sums

    hidden = decoder.embed(list(tokens.split(1)))
    state = work / STATE
    first = _resume(state, hidden)
    bar = tqdm(range(first, len(decoder)), desc="statistics", unit="layer", initial=first, total=len(decoder))
    for index in bar:
        with decoder.layer(index) as layer, listening(layer, {}) as sums:
            hidden = [decoder.run(index, layer, rows) for rows in hidden]
        save_sums(sums, statistics_file(work, index))
        save({"hidden": torch.cat(hidden)}, state, {DONE: str(index + 1)})
    save_output_sums(decoder.norm(), hidden, work)
    state.unlink()


def _resume(state: Path, hidden: list[Tensor]) -> int:
    """The layer to go on with; `hidden` becomes what it reads."""
    from safetensors import safe_open

    if not state.exists():
        return 0
    with safe_open(state, framework="pt") as file:
        done = int(file.metadata()[DONE])
        rows = file.get_tensor("hidden").to(hidden[0].device)
    hidden[:] = rows.split(1)
    print(f"going on at layer {done}", flush=True)
    return done


def load_statistics(directory: Path, layer: int | None, device: str) -> dict[str, Input]:
    """What is known of the input of each linear layer in decoder layer `layer`, by its name there; layers that read the
    same input have the same object. layer: None for the output layer, `OUTPUT`. TaskError if there are none."""
    from safetensors import safe_open

    from tasks.sums import READERS

    path = statistics_file(directory, layer)
    if not path.is_file():
        raise TaskError(f"{path} is not there; run the statistics stage first: modelpress run")
    found: dict[str, Input] = {}
    with safe_open(path, framework="pt", device=device) as file:
        for first, readers in json.loads(file.metadata()[READERS]).items():
            known = Input(*(file.get_tensor(f"{first}.{key}") for key in ("gram", "largest", "mean")))
            found |= dict.fromkeys(readers, known)
    return found


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
