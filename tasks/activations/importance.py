"""Statistics whose tokens count by how much of what the model says hangs on them, in each layer.

An error that a layer makes at one token changes the model's answers, at another it is hardly seen. A token's weight is
the gradient, with respect to what a linear layer makes of it, of the log-likelihood of words drawn from the model's own
predictions (the Fisher information): squared, summed over the layer's outputs, and then its root, which noise moves
less. Gram matrices of weighted tokens: GuidedQuant (arXiv 2505.07004), with the square itself; RSQ (arXiv 2503.01820),
with weights from the attention.

The model runs forward layer by layer and then backward, each layer computed anew from what it had read; on that way
back its inputs are summed, each sequence as soon as its weights are known. One layer's weights are in memory at a time.
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

SEED = 0  # of the words that are drawn
KEPT = torch.bfloat16  # of activations and gradients between the layers: a weight needs no more
ROWS = "rows"


@dataclass
class Read:
    """One distinct input of a layer's linear layers, in one pass. x: [rows, length, channels]; square: the squared
    gradient of what its readers make of it, float32 [rows, length], once the way back has passed."""

    x: Tensor
    readers: list[str] = field(default_factory=list)
    square: Tensor | float = 0.0


def collect_weighed(decoder: Decoder, tokens: Tensor, work: Path) -> None:
    """Write each layer's sums, and as `importance.N.safetensors` its tokens' weights: of each distinct input, by the
    first linear layer that reads it, float32 [sequences, length], with a mean of 1 in each sequence.

    tokens: int64 [sequences, length]. What was written before an interruption is not done again.
    """
    if not _file(work, "importance", 0).exists():
        embedded = [rows.to(KEPT) for rows in decoder.embed(list(tokens.split(1)))]
        if not any(work.glob("gradient.*.safetensors")):
            _forward(decoder, embedded, work)
        _backward(decoder, work)
    for path in (*work.glob("hidden.*.safetensors"), *work.glob("gradient.*.safetensors")):
        path.unlink()


def load_importance(directory: Path, layer: int, device: str) -> dict[str, Tensor]:
    """The tokens' weights in decoder layer `layer`, as `collect_weighed` wrote them; empty if it did not."""
    path = _file(directory, "importance", layer)
    return load_file(path, device=device) if path.exists() else {}


def _forward(decoder: Decoder, hidden: list[Tensor], work: Path) -> None:
    """Keep what each layer reads, and the gradient of what the last one makes. hidden: what the first reads."""
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
    draw = torch.Generator().manual_seed(SEED)  # of the CPU's, so that a GPU draws the same words
    with decoder.head() as head:
        found = [_likelihood_gradient(head, rows, draw) for rows in tqdm(hidden, desc="predictions", unit="sequence")]
    _keep(found, work, "gradient", last)


def _likelihood_gradient(head: Callable[[Tensor], Tensor], hidden: Tensor, draw: torch.Generator) -> Tensor:
    """The gradient of the log-likelihood of drawn words, with respect to what the output layer reads."""
    parts = []
    for chunk in hidden.split(PREDICTED, 1):
        x = chunk.float().requires_grad_()
        logits = head(x)
        slope = logits.detach().float().softmax(-1)
        # where a random share of the probabilities, added up, is reached; torch.multinomial takes three times as long
        shares = torch.rand(slope.shape[1], 1, generator=draw).to(slope.device)
        words = torch.searchsorted(slope[0].cumsum(-1), shares).clamp_(max=slope.shape[2] - 1)
        # of the cross-entropy: the probabilities, less one for the word itself
        slope[0].scatter_add_(1, words, torch.full_like(words, -1, dtype=slope.dtype))
        parts += torch.autograd.grad(logits, x, slope.to(logits.dtype))
    return torch.cat(parts, 1).to(KEPT)


def _backward(decoder: Decoder, work: Path) -> None:
    """Carry the gradient from the last layer to the first, and write each layer's sums and weights on the way."""
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
                    # made for every sequence and thrown away, in next to no time: made once, the peak of the demo's
                    # statistics was 1.2 GB, not 1.0, for the C library then gave less memory back
                    own = sums.setdefault(name, Sums(read.readers, read.x.shape[-1], read.x.device))
                    own.add(read.x, weight)
                seen.clear()
        save_sums(sums, statistics_file(work, index))
        save({name: torch.cat(parts) for name, parts in weights.items()}, _file(work, "importance", index))
        _keep(gradient, work, "gradient", index)
        for name in ("hidden", "gradient"):
            _file(work, name, index + 1).unlink(missing_ok=True)


def _weight(square: Tensor) -> Tensor:
    """From the squared gradient [rows, length] to weights with a mean of 1; where nothing hangs on any, all weigh 1."""
    root = square.sqrt()
    mean = root.mean(-1, keepdim=True)
    return torch.where(mean > 0, root / mean, 1.0)


@contextmanager
def _watching(layer: nn.Module) -> Iterator[dict[str, Read]]:
    """What the linear layers in `layer` read in a pass through it and back, by the first that reads it; to be cleared
    before the next."""
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
