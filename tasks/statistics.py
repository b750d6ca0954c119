"""The statistics stage: what every quantization method needs to know of the model's activations, from one pass.

python -m tasks.statistics

For each decoder layer a safetensors file, for each distinct input in it (q, k and v read the same one): its Gram matrix
X^T X, its largest and its mean magnitude by channel. The model runs layer by layer; one layer's weights, its statistics
and the activations are in memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.device import compute_device, peak_memory
from tasks.errors import TaskError
from tasks.output import whole_directory, write_json
from tasks.program import run_stage
from tasks.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.decoder import Decoder

READERS = "readers"


@dataclass(frozen=True)
class Input:
    """What is known of a linear layer's inputs X, over all calibration tokens.

    gram: X^T X, float32 [channels, channels]. largest, mean: of the magnitudes, float32 [channels].
    """

    gram: Tensor
    largest: Tensor
    mean: Tensor


@dataclass(frozen=True)
class StatisticsReport:
    """metrics/statistics.json. dtype: of the model's arithmetic; sums are float32. estimate: see `estimate_bytes`."""

    tokens: int
    layers: int
    dtype: str
    device: str
    seconds: float
    bytes: int
    estimate_bytes: int
    peak_memory_bytes: int


def collect(model: Path, calibration: Path, destination: Path) -> StatisticsReport:
    """Run the model over the calibration tokens and write `layers.N.safetensors` for each layer.

    TaskError if the model has no decoder layers in safetensors files.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from tasks.decoder import Decoder

    started = time.monotonic()
    device = compute_device()
    tokens = load_file(calibration / "tokens.safetensors")["input_ids"]
    decoder = Decoder(model, torch.float32, device)
    with whole_directory(destination) as work:
        # one sequence at a time stays in a CPU's cache
        hidden = decoder.embed(list(tokens.split(1)))
        for index in tqdm(range(len(decoder)), desc="statistics", unit="layer"):
            gathered = _layer(decoder, index, hidden)
            readers = {name: entry.readers for name, entry in gathered.items()}
            save_file(
                {f"{name}.{key}": value for name, entry in gathered.items() for key, value in entry.tensors().items()},
                work / f"layers.{index}.safetensors",
                metadata={READERS: json.dumps(readers)},
            )
        size = sum(path.stat().st_size for path in work.iterdir())
    return StatisticsReport(
        tokens=tokens.numel(),
        layers=len(decoder),
        dtype=str(decoder.dtype).removeprefix("torch."),
        device=device,
        seconds=round(time.monotonic() - started, 1),
        bytes=size,
        estimate_bytes=0,
        peak_memory_bytes=peak_memory(),
    )


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


def _layer(decoder: Decoder, index: int, hidden: list[Tensor]) -> dict[str, _Sums]:
    """The sums of one layer's inputs; `hidden` becomes what the next layer reads."""
    with decoder.layer(index) as layer, _listening(layer) as sums:
        for number, batch in enumerate(hidden):
            hidden[number] = decoder.run(index, layer, batch)
    return sums


class _Sums:
    """Sums over the tokens of one input."""

    def __init__(self, channels: int, device: Any) -> None:
        import torch

        self.readers: list[str] = []
        self.tokens = 0
        self.gram = torch.zeros(channels, channels, device=device)
        self.largest, self.total = torch.zeros(2, channels, device=device)

    def add(self, x: Tensor) -> None:
        """Count what the layers read: [..., channels]."""
        x = x.flatten(0, -2).float()
        self.gram.addmm_(x.T, x)
        magnitude = x.abs()
        self.largest = self.largest.maximum(magnitude.amax(0))
        self.total += magnitude.sum(0)
        self.tokens += len(x)

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored."""
        return {
            "gram": self.gram.cpu(),
            "largest": self.largest.cpu().contiguous(),
            "mean": (self.total / self.tokens).cpu(),
        }


@contextmanager
def _listening(layer: nn.Module) -> Iterator[dict[str, _Sums]]:
    """Sums of what the linear layers inside `layer` read; those that read the same tensor share them."""
    from torch import nn

    sums: dict[str, _Sums] = {}
    seen: list[tuple[Tensor, str]] = []  # of one pass through the layer; holding them keeps them apart

    def hear(name: str, x: Tensor) -> None:
        first = next((other for tensor, other in seen if tensor is x), None)
        if first is None:
            seen.append((x, name))
            if name not in sums:
                sums[name] = _Sums(x.shape[-1], x.device)
                sums[name].readers.append(name)
            sums[name].add(x)
        elif name not in sums[first].readers:
            sums[first].readers.append(name)

    handles = [layer.register_forward_hook(lambda *_: seen.clear())]
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: hear(name, args[0])))
    yield sums
    for handle in handles:
        handle.remove()


def main() -> None:
    """Run the stage on the model and the calibration tokens in the current directory."""

    def work(_: Settings) -> None:
        report = collect(Path("models/source"), Path("data/calibration"), Path("data/statistics"))
        write_json(Path("metrics/statistics.json"), asdict(report))
        print(f"{report.layers} layers, {report.tokens:,} tokens, {report.bytes / 1e6:.0f} MB, {report.seconds} s")

    run_stage(work)


if __name__ == "__main__":
    main()
