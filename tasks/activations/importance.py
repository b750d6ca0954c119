"""Statistics that weight each token, in each layer, by its influence on the output (Fisher information).

A token's weight is the gradient of the log-likelihood of tokens drawn from the model's predictions, with respect to a
linear layer's output: squared, summed over the layer's outputs, then the square root, which is less sensitive to noise.
Gram matrices of weighted tokens: GuidedQuant (arXiv 2505.07004), with the square; RSQ (arXiv 2503.01820), with weights
from attention.

The model runs forward and then backward, layer by layer, recomputing each layer from its saved input. The backward pass
sums the inputs of each sequence as soon as its weights are known. One layer's weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from tasks.activations.gram import Inputs, Sums, save_output_sums, save_sums
from tasks.activations.memory import PREDICTED
from tasks.activations.store import statistics_file
from tasks.tensor_files import save

if TYPE_CHECKING:
    from tasks.model.decoder import Decoder

SEED = 0  # for drawing tokens
KEPT = torch.bfloat16  # dtype of saved activations and gradients: precise enough for token weights
ROWS = "rows"


@dataclass
class Read:
    """One distinct input of a layer's linear layers, in one pass. x: [rows, length, channels]; square: the squared
    gradient of its readers' outputs, float32 [rows, length], filled in the backward pass."""

    x: Tensor
    readers: list[str] = field(default_factory=list)
    square: Tensor | float = 0.0


def collect_weighed(decoder: Decoder, tokens: Tensor, work: Path) -> None:
    """Write each layer's sums, and its token weights as `importance.N.safetensors`: for each distinct input, by the
    first linear layer that reads it, float32 [sequences, length], with a mean of 1 in each sequence.

    tokens: int64 [sequences, length]. Resumes after an interruption.
    """
    if not _file(work, "importance", 0).exists():
        embedded = [rows.to(KEPT) for rows in decoder.embed(list(tokens.split(1)))]
        if not any(work.glob("gradient.*.safetensors")):
            _forward(decoder, embedded, work)
        _backward(decoder, work)
    for path in (*work.glob("hidden.*.safetensors"), *work.glob("gradient.*.safetensors")):
        path.unlink()


def load_importance(directory: Path, layer: int, device: str) -> dict[str, Tensor]:
    """Load the token weights of decoder layer `layer` from `collect_weighed`; empty if there are none."""
    path = _file(directory, "importance", layer)
    return load_file(path, device=device) if path.exists() else {}


def _forward(decoder: Decoder, hidden: list[Tensor], work: Path) -> None:
    """Save each layer's input, and the gradient of the last layer's output. hidden: the first layer's input."""
    last = len(decoder)
    begun = max((index for index in range(last + 1) if _file(work, "hidden", index).exists()), default=0)
    if begun:
        hidden = _rows(work, "hidden", begun, decoder.device)
    else:
        _keep(hidden, work, "hidden", 0)
    for index in tqdm(range(begun, last), desc="forward", unit="layer", initial=begun, total=last):
        with decoder.layer(index) as layer:
            hidden = [decoder.run(index, layer, rows.float()).to(KEPT) for rows in hidden]
        _keep(hidden, work, "hidden", index + 1)
    save_output_sums(decoder.norm(), hidden, work)
    draw = torch.Generator().manual_seed(SEED)  # on the CPU, so that a GPU draws the same tokens
    with decoder.head() as head:
        found = [_likelihood_gradient(head, rows, draw) for rows in tqdm(hidden, desc="predictions", unit="sequence")]
    _keep(found, work, "gradient", last)


def _likelihood_gradient(head: Callable[[Tensor], Tensor], hidden: Tensor, draw: torch.Generator) -> Tensor:
    """The gradient of the log-likelihood of drawn tokens with respect to the output layer's input."""
    parts = []
    for chunk in hidden.split(PREDICTED, 1):
        x = chunk.float().requires_grad_()
        logits = head(x)
        slope = logits.detach().float().softmax(-1)
        # inverse transform sampling; torch.multinomial takes three times as long
        shares = torch.rand(slope.shape[1], 1, generator=draw).to(slope.device)
        words = torch.searchsorted(slope[0].cumsum(-1), shares).clamp_(max=slope.shape[2] - 1)
        # gradient of the cross-entropy: the probabilities, minus 1 for the drawn token
        slope[0].scatter_add_(1, words, torch.full_like(words, -1, dtype=slope.dtype))
        parts += torch.autograd.grad(logits, x, slope.to(logits.dtype))
    return torch.cat(parts, 1).to(KEPT)


def _backward(decoder: Decoder, work: Path) -> None:
    """Propagate the gradient from the last layer to the first, and write each layer's sums and token weights."""
    last = len(decoder)
    begun = min(index for index in range(last + 1) if _file(work, "gradient", index).exists())
    gradient = _rows(work, "gradient", begun, decoder.device)
    bar = tqdm(reversed(range(begun)), desc="backward", unit="layer", initial=last - begun, total=last)
    for index in bar:
        sums: dict[str, Sums] = {}
        weights: dict[str, list[Tensor]] = {}
        hidden = _rows(work, "hidden", index, decoder.device)
        with decoder.layer(index) as layer, _watching(layer) as seen:
            for number, rows in enumerate(hidden):
                x = rows.float().requires_grad_()
                made = decoder.run(index, layer, x)
                (slope,) = torch.autograd.grad(made, x, gradient[number].to(made.dtype))
                gradient[number] = slope.to(KEPT)
                for name, read in seen.items():
                    weight = _weight(torch.as_tensor(read.square))
                    weights.setdefault(name, []).append(weight)
                    # creating it for every sequence costs next to nothing; created once, the peak of the demo's
                    # statistics was 1.2 GB instead of 1.0, because the C library returned less memory
                    own = sums.setdefault(name, Sums(read.readers, read.x.shape[-1], read.x.device))
                    own.add(read.x, weight)
                seen.clear()
        save_sums(sums, statistics_file(work, index))
        save({name: torch.cat(parts) for name, parts in weights.items()}, _file(work, "importance", index))
        _keep(gradient, work, "gradient", index)
        for name in ("hidden", "gradient"):
            _file(work, name, index + 1).unlink(missing_ok=True)


def _weight(square: Tensor) -> Tensor:
    """Turn squared gradients [rows, length] into weights with a mean of 1; all 1 if all gradients are 0."""
    root = square.sqrt()
    mean = root.mean(-1, keepdim=True)
    return torch.where(mean > 0, root / mean, 1.0)


@contextmanager
def _watching(layer: nn.Module) -> Iterator[dict[str, Read]]:
    """Record the inputs and output gradients of the linear layers in `layer`, by the first reader of each input. Clear
    the result before the next pass."""
    seen: dict[str, Read] = {}
    inputs = Inputs()

    def watch(name: str, x: Tensor, made: Tensor) -> None:
        first = inputs.first(name, x)
        read = seen.setdefault(first, Read(x.detach()))
        read.readers.append(name)

        def add(gradient: Tensor) -> None:
            read.square = read.square + gradient.float().square().sum(-1)

        made.register_hook(add)

    handles = [layer.register_forward_hook(lambda *_: inputs.clear())]
    handles += [
        module.register_forward_hook(lambda _, args, made, name=name: watch(name, args[0], made))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def _file(work: Path, name: str, index: int) -> Path:
    return work / f"{name}.{index}.safetensors"


def _keep(rows: list[Tensor], work: Path, name: str, index: int) -> None:
    save({ROWS: torch.cat(rows)}, _file(work, name, index))


def _rows(work: Path, name: str, index: int, device: str) -> list[Tensor]:
    return list(load_file(_file(work, name, index), device=device)[ROWS].split(1))
