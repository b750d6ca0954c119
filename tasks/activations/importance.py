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

from tasks.activations.gram import Sums, experts_with_few, fill_experts, save_output_sums, save_sums
from tasks.activations.hearing import hearing
from tasks.activations.memory import PREDICTED
from tasks.activations.store import ROWS, hidden_file, importance_file, statistics_file
from tasks.errors import TaskError
from tasks.model.linears import Origins
from tasks.model.products import Product
from tasks.model.structure import LayerStructure
from tasks.tensor_files import save

if TYPE_CHECKING:
    from tasks.model.decoder import Decoder

SEED = 0  # for drawing tokens
KEPT = torch.bfloat16  # dtype of saved activations and gradients: precise enough for token weights


@dataclass
class Read:
    """One distinct input of a layer's linear layers, in one pass. x: [rows, length, channels]; square: the squared
    gradient of its readers' outputs, float32 [rows, length], filled in the backward pass."""

    x: Tensor
    readers: list[str] = field(default_factory=list)
    square: Tensor | float = 0.0

    def squares(self) -> Tensor:
        """`square`; zeros if no gradient reached the readers, as where their output only chooses tokens."""
        return self.square if isinstance(self.square, Tensor) else torch.zeros(self.x.shape[:-1], device=self.x.device)


def collect_weighed(
    decoder: Decoder, layers: list[LayerStructure], tokens: Tensor, work: Path, least: int, products: bool = True
) -> None:
    """Write each layer's sums, and its token weights as `importance.N.safetensors`: for each distinct input, by the
    first linear layer that reads it, float32 [sequences, length], with a mean of 1 in each sequence.

    An expert's weights have a mean of 1 over the tokens of all experts in the layer, and are written in the order in
    which it saw them.

    tokens: int64 [sequences, length]; least: tokens of an expert (gram.py); products: whether Gram matrices are summed;
    else what each layer reads is kept (store.py). Resumes after an interruption. TaskError if layers share keys and
    values, where a layer's gradient is not that of its output alone.
    """
    first = next(iter(decoder.order))
    if not importance_file(work, first).exists():
        embedded = [rows.to(KEPT) for rows in decoder.embed(list(tokens.split(1)))]
        if decoder.shares_state:
            raise TaskError(
                f"the layers of the {decoder.model.config.model_type} model share keys and values, so a token's weight "
                "cannot be found layer by layer; set statistics.importance to false"
            )
        if not any(work.glob("gradient.*.safetensors")):
            _forward(decoder, embedded, work)
        _backward(decoder, layers, work, least, products)
    for path in (*work.glob("hidden.*.safetensors"), *work.glob("gradient.*.safetensors")):
        if products or path not in [hidden_file(work, index) for index in decoder.order]:
            path.unlink()


def load_importance(directory: Path, layer: int, device: str) -> dict[str, Tensor]:
    """Load the token weights of decoder layer `layer` from `collect_weighed`; empty if there are none."""
    path = importance_file(directory, layer)
    return load_file(path, device=device) if path.exists() else {}


def _forward(decoder: Decoder, hidden: list[Tensor], work: Path) -> None:
    """Save each layer's input, and the gradient of the last layer's output. hidden: the first layer's input."""
    last = len(decoder)
    begun = max((index for index in range(last + 1) if hidden_file(work, index).exists()), default=0)
    if begun:
        hidden = _rows(hidden_file(work, begun), decoder.device)
    else:
        _keep(hidden, hidden_file(work, 0))
    for index in tqdm(range(begun, last), desc="forward", unit="layer", initial=begun, total=last):
        if index in decoder.order:
            with decoder.layer(index) as layer:
                hidden = [decoder.run(index, layer, rows.float(), n).to(KEPT) for n, rows in enumerate(hidden)]
        _keep(hidden, hidden_file(work, index + 1))
    save_output_sums(decoder, hidden, work)
    draw = torch.Generator().manual_seed(SEED)  # on the CPU, so that a GPU draws the same tokens
    with decoder.head() as head:
        found = [_likelihood_gradient(head, rows, draw) for rows in tqdm(hidden, desc="predictions", unit="sequence")]
    _keep(found, _gradient_file(work, last))


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


def _backward(decoder: Decoder, layers: list[LayerStructure], work: Path, least: int, products: bool) -> None:
    """Propagate the gradient from the last layer to the first, and write each layer's sums and token weights."""
    last = len(decoder)
    begun = min(index for index in range(last + 1) if _gradient_file(work, index).exists())
    gradient = _rows(_gradient_file(work, begun), decoder.device)
    bar = tqdm(reversed(range(begun)), desc="backward", unit="layer", initial=last - begun, total=last)
    for index in bar:
        if index in decoder.order:
            _backward_through(decoder, layers[index], index, gradient, work, least, products)
        _keep(gradient, _gradient_file(work, index))
        if products:
            hidden_file(work, index + 1).unlink(missing_ok=True)
        _gradient_file(work, index + 1).unlink(missing_ok=True)


def _backward_through(
    decoder: Decoder,
    structure: LayerStructure,
    index: int,
    gradient: list[Tensor],
    work: Path,
    least: int,
    products: bool,
) -> None:
    """Propagate `gradient`, in place, through one layer, and write its sums and token weights."""
    sums: dict[str, Sums] = {}
    weights: dict[str, list[Tensor]] = {}
    hidden = _rows(hidden_file(work, index), decoder.device)
    with decoder.layer(index) as layer, _watching(layer, structure, decoder.origins(index)) as seen:
        for number, rows in enumerate(hidden):
            x = rows.float().requires_grad_()
            made = decoder.run(index, layer, x, number)
            (slope,) = torch.autograd.grad(made, x, gradient[number].to(made.dtype))
            gradient[number] = slope.to(KEPT)
            for name, weight in _weights(seen, structure).items():
                read = seen[name]
                weights.setdefault(name, []).append(weight)
                # creating it for every sequence costs next to nothing; created once, the peak of the demo's
                # statistics was 1.2 GB instead of 1.0, because the C library returned less memory
                own = sums.setdefault(name, Sums(read.readers, read.x.shape[-1], read.x.device, products))
                own.add(read.x, weight)
            seen.clear()
    few = experts_with_few(sums, structure, least)
    fill_experts(sums, structure, few, hidden[0].device, products)
    save_sums(sums, statistics_file(work, index), few)
    save({name: torch.cat(parts) for name, parts in weights.items()}, importance_file(work, index))


def _weights(seen: dict[str, Read], structure: LayerStructure) -> dict[str, Tensor]:
    """The token weights of each input. Those of an expert are relative to the layer's tokens, not to its own: their
    squares are divided by a mean over all experts of a kind."""
    found = {}
    kinds: dict[str, list[str]] = {}
    for name, read in seen.items():
        if name in structure.experts:
            kinds.setdefault(structure.experts[name], []).append(name)
        else:
            found[name] = _weight(read.squares())
    for names in kinds.values():
        squares = [seen[name].squares().flatten() for name in names]
        weight = _weight(torch.cat(squares))
        found |= dict(zip(names, weight.split([len(one) for one in squares]), strict=True))
    return {name: found[name] for name in seen}


def _weight(square: Tensor) -> Tensor:
    """Turn squared gradients [rows, length] into weights with a mean of 1; all 1 if all gradients are 0."""
    root = square.sqrt()
    mean = root.mean(-1, keepdim=True)
    return torch.where(mean > 0, root / mean, 1.0)


@contextmanager
def _watching(layer: nn.Module, structure: LayerStructure, origins: Origins) -> Iterator[dict[str, Read]]:
    """Record the inputs and output gradients of the linear layers in `layer`, by the first reader of each input. Clear
    the result before the next pass."""
    seen: dict[str, Read] = {}

    def watch(first: str, names: list[str], product: Product) -> None:
        read = seen.setdefault(first, Read(product.x.detach()))
        read.readers.extend(names)

        def add(gradient: Tensor) -> None:
            read.square = read.square + gradient.float().square().sum(-1)

        if product.made.requires_grad:
            product.made.register_hook(add)

    with hearing(layer, structure, origins, watch):
        yield seen


def _gradient_file(work: Path, index: int) -> Path:
    return work / f"gradient.{index}.safetensors"


def _keep(rows: list[Tensor], path: Path) -> None:
    save({ROWS: torch.cat(rows)}, path)


def _rows(path: Path, device: str) -> list[Tensor]:
    return list(load_file(path, device=device)[ROWS].split(1))
