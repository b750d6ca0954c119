"""Sums over the inputs of a decoder layer's linear layers: Gram matrix, largest and mean magnitude by channel.

Linear layers with the same input tensor, such as q, k and v, share their sums, under the name of the first. The output
layer has sums as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tasks.activations.store import READERS, statistics_file
from tasks.tensor_files import OUTPUT, save

BLOCK = 384  # rows of a Gram matrix per product; only the upper blocks are computed, the lower ones are mirrored


class Inputs:
    """Identifies each distinct input tensor in one pass through a layer by the first linear layer that reads it."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, str]] = []  # keeps the tensors alive, so that identities stay distinct

    def first(self, name: str, x: Tensor) -> str:
        """The first layer that read this tensor object; `name` if there is none."""
        found = next((other for tensor, other in self._seen if tensor is x), None)
        if found is None:
            self._seen.append((x, name))
        return found or name

    def clear(self) -> None:
        """Start another pass."""
        self._seen.clear()


class Sums:
    """Sums over the tokens of one input, float32. readers: the layers that read it; tokens: counted so far."""

    def __init__(self, readers: list[str], channels: int, device: torch.device) -> None:
        self.readers = readers
        self.tokens = 0
        self._gram = torch.zeros(channels, channels, device=device)  # `add` fills only the upper blocks
        self._largest, self._total = torch.zeros(2, channels, device=device)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs [..., channels]. weights: of the tokens in the Gram matrix; None: all 1."""
        x = x.flatten(0, -2).float()
        magnitude = x.abs()
        torch.maximum(self._largest, magnitude.amax(0), out=self._largest)
        self._total += magnitude.sum(0)
        self.tokens += len(x)
        if weights is not None:
            x = x * weights.flatten().sqrt()[:, None]
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, x.shape[1], BLOCK):
                end = start + BLOCK
                self._gram[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors: `gram`, `largest` and `mean` of tasks.activations.store.Input."""
        for start in range(0, len(self._gram), BLOCK):
            end = start + BLOCK
            self._gram[end:, start:end] = self._gram[start:end, end:].T
        return {"gram": self._gram, "largest": self._largest, "mean": self._total / self.tokens}


@contextmanager
def recording_inputs(layer: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Sums]]:
    """Record the sums of the inputs of the linear layers in `layer`, by the first reader of each input.

    weights: of the tokens, [sequences, length] by first reader; missing: all equal.
    """
    sums: dict[str, Sums] = {}
    inputs = Inputs()

    def hear(name: str, x: Tensor) -> None:
        first = inputs.first(name, x)
        if first == name:
            own = sums.setdefault(name, Sums([name], x.shape[-1], x.device))
            weight = weights.get(name)
            own.add(x, None if weight is None else weight.flatten()[own.tokens : own.tokens + x[..., 0].numel()])
        elif name not in sums[first].readers:
            sums[first].readers.append(name)

    handles = [layer.register_forward_hook(lambda *_: inputs.clear())]
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: hear(name, args[0])))
    yield sums
    for handle in handles:
        handle.remove()


@torch.no_grad()
def save_output_sums(norm: nn.Module, hidden: Sequence[Tensor], work: Path) -> None:
    """Save the sums of the output layer's input. norm: the module before it; hidden: its input, in batches."""
    sums = Sums([OUTPUT], hidden[0].shape[-1], hidden[0].device)
    for rows in hidden:
        sums.add(norm(rows.float()))
    save_sums({OUTPUT: sums}, statistics_file(work, None))


def save_sums(sums: Mapping[str, Sums], path: Path) -> None:
    """Save a layer's sums for `tasks.activations.store.load_statistics`."""
    readers = json.dumps({name: one.readers for name, one in sums.items()})
    found = {f"{name}.{key}": tensor for name, one in sums.items() for key, tensor in one.tensors().items()}
    save(found, path, {READERS: readers})
