"""The statistics stage: what every quantization method needs to know of the model's activations, from one pass.

python -m tasks.statistics

For each decoder layer a safetensors file, for each distinct input in it (q, k and v read the same one): its Gram matrix
X^T X, its largest and its mean magnitude by channel. The model runs layer by layer; one layer's weights, its statistics
and the activations are in memory. Before, on request, the tokens are weighed (importance.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.device import compute_device, current_memory, fast_dtype, peak_memory
from tasks.errors import TaskError
from tasks.output import checksums, resumable_directory, write_json
from tasks.program import run_stage
from tasks.settings import Settings
from tasks.weights import save

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tasks.decoder import Decoder

READERS, DONE = "readers", "done"
STATE = "state.safetensors"  # what the next layer reads, while there is one
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
    """Run the model over the calibration tokens and write `layers.N.safetensors` for each layer.

    importance: weigh the tokens in the Gram matrices by how much hangs on them (tasks/importance.py).
    A run that was interrupted goes on at its layer. TaskError if the model has no decoder layers in safetensors files.
    """
    import torch
    from safetensors.torch import load_file

    from tasks.decoder import Decoder
    from tasks.importance import load_importance, weigh_tokens

    started = time.monotonic()
    device = compute_device()
    dtype = fast_dtype(device)
    tokens = load_file(calibration / "tokens.safetensors")["input_ids"]
    decoder = Decoder(model, torch.float32, device)
    estimate = estimate_bytes(decoder, tokens, importance)
    print(f"needs about {estimate / 1e9:.1f} GB of memory", flush=True)
    with resumable_directory(destination, _key(model, calibration, device, dtype, importance)) as work:
        # one sequence at a time stays in a CPU's cache
        if importance:
            weigh_tokens(decoder, tokens, work, dtype)
        hidden = decoder.embed(list(tokens.split(1)))
        state = work / STATE
        first = _resume(state, hidden)
        bar = tqdm(range(first, len(decoder)), desc="statistics", unit="layer", initial=first, total=len(decoder))
        for index in bar:
            gathered = _layer(decoder, index, hidden, dtype, load_importance(work, index, device))
            readers = json.dumps({name: entry.readers for name, entry in gathered.items()})
            found = {f"{name}.{key}": v for name, entry in gathered.items() for key, v in entry.tensors().items()}
            save(found, work / f"layers.{index}.safetensors", {READERS: readers})
            save({"hidden": torch.cat(hidden)}, state, {DONE: str(index + 1)})
        state.unlink()
        size = sum(path.stat().st_size for path in work.iterdir())
    return StatisticsReport(
        tokens=tokens.numel(),
        layers=len(decoder),
        dtype=str(dtype).removeprefix("torch."),
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
        tokens.numel(), tokens.shape[1], widths, vocabulary, decoder.layer_parameters, importance
    )


def needed_bytes(
    tokens: int, sequence_length: int, widths: Sequence[int], vocabulary: int, layer_parameters: int, importance: bool
) -> int:
    """The memory, bytes, that the pass takes beyond what the process holds: all activations twice, and the most of

    - the embedding, as it is stored and as float32,
    - one layer's weights in both, its Gram matrices, and what one sequence passes through inside the layer,
    - where tokens are weighed, the output layer in both and the predictions of `PREDICTED` tokens five times over.

    Where tokens are weighed, what a sequence leaves inside a layer for the way back comes on top, for the process does
    not give it back: three times what it passes through.

    widths: of the distinct inputs in a layer; the first is that of the layer itself.
    """
    hidden, inner = widths[0], max(widths)
    activations = tokens * hidden
    sequence = sequence_length * (3 * inner + 8 * hidden)
    grams = sum(width**2 for width in widths)
    stored = 1.5  # a weight of 2 bytes beside the same one of 4
    outer = stored * vocabulary * hidden
    most = max(outer, stored * layer_parameters + grams + sequence)
    if importance:
        most = max(most, outer + 5 * PREDICTED * vocabulary) + 3 * sequence
    return int(4 * (2 * activations + most))


def _key(model: Path, calibration: Path, device: str, dtype: torch.dtype, importance: bool) -> str:
    """What the statistics depend on."""
    import torch
    import transformers

    parts = [torch.__version__, transformers.__version__, device, str(dtype), str(importance)]
    parts += [checksum for folder in (model, calibration) for checksum in sorted(checksums(folder).values())]
    return "\n".join(parts)


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


def load_statistics(directory: Path, layer: int, device: str) -> dict[str, Input]:
    """What is known of the input of each linear layer in decoder layer `layer`, by its name there; layers that read the
    same input have the same object. TaskError if the statistics are not there."""
    from safetensors import safe_open

    path = directory / f"layers.{layer}.safetensors"
    if not path.is_file():
        raise TaskError(f"{path} is not there; run the statistics stage first: modelpress run")
    found: dict[str, Input] = {}
    with safe_open(path, framework="pt", device=device) as file:
        for first, readers in json.loads(file.metadata()[READERS]).items():
            known = Input(*(file.get_tensor(f"{first}.{key}") for key in ("gram", "largest", "mean")))
            found |= dict.fromkeys(readers, known)
    return found


def _layer(
    decoder: Decoder, index: int, hidden: list[Tensor], dtype: torch.dtype, weights: Mapping[str, Tensor]
) -> dict[str, _Sums]:
    """The sums of one layer's inputs; `hidden` becomes what the next layer reads. dtype: of the matrix products;
    weights: of the tokens, as in `listening`."""
    import torch

    with decoder.layer(index) as layer, listening(layer, weights) as sums:
        for number, batch in enumerate(hidden):
            with torch.autocast(decoder.device, dtype, enabled=dtype != decoder.dtype):
                hidden[number] = decoder.run(index, layer, batch)
    return sums


class _Sums:
    """Sums over the tokens of one input. weights: of the tokens in the Gram matrix, in their order; None: all are 1."""

    def __init__(self, channels: int, device: Any, weights: Tensor | None) -> None:
        import torch

        self.readers: list[str] = []
        self.tokens = 0
        self.gram = torch.zeros(channels, channels, device=device)
        self.largest, self.total = torch.zeros(2, channels, device=device)
        self._roots = None if weights is None else weights.flatten().sqrt()

    def add(self, x: Tensor) -> None:
        """Count what the layers read: [..., channels]."""
        import torch

        x = x.flatten(0, -2).float()
        magnitude = x.abs()
        self.largest = self.largest.maximum(magnitude.amax(0))
        self.total += magnitude.sum(0)
        if self._roots is not None:
            x = x * self._roots[self.tokens : self.tokens + len(x), None]
        with torch.autocast(x.device.type, enabled=False):
            self.gram.addmm_(x.T, x)
        self.tokens += len(x)

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored."""
        return {"gram": self.gram, "largest": self.largest, "mean": self.total / self.tokens}


@contextmanager
def listening(layer: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, _Sums]]:
    """Sums of what the linear layers inside `layer` read; those that read the same tensor share them.

    weights: of the tokens that will pass, [sequences, length] by the first layer that reads them; where there are none,
    all weigh the same.
    """
    from torch import nn

    from tasks.importance import Inputs

    sums: dict[str, _Sums] = {}
    inputs = Inputs()

    def hear(name: str, x: Tensor) -> None:
        first = inputs.first(name, x)
        if first == name:
            if name not in sums:
                sums[name] = _Sums(x.shape[-1], x.device, weights.get(name))
                sums[name].readers.append(name)
            sums[name].add(x)
        elif name not in sums[first].readers:
            sums[first].readers.append(name)

    handles = [layer.register_forward_hook(lambda *_: inputs.clear())]
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: hear(name, args[0])))
    yield sums
    for handle in handles:
        handle.remove()


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
