"""Checks of a quantized layer while it is made: scaled, it makes the same; what is written is its own.

The evaluation at the end would show such faults as a worse model; here they have a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tasks.errors import TaskError
from tasks.grid import QuantizedWeight
from tasks.model.decoder import Decoder
from tasks.model.linears import join, split
from tasks.model.structure import LayerStructure
from tasks.quantizers import QuantizeJob
from tasks.quantizers.layer import Layer

TOKENS = 32
CHANGED = 2e-3  # relative to the largest number; norms stored in bfloat16 are compensated, other rounding is float32's
STRANGE = 1.0  # relative; a weight and another's rounding are about 1.4 apart, a weight and its own below 0.5


def check_scaled(job: QuantizeJob, layer: Layer, whole: LayerStructure | None = None) -> None:
    """TaskError if the layer, scaled but not yet rounded, makes other numbers than the source's. whole: the structure
    of the layer, if `layer` is a share of it."""
    if not layer.scaled:
        return
    decoder, hidden = _decoder(job.source, job.device)
    with torch.no_grad():
        with decoder.layer(layer.index) as own:
            before = decoder.everything(layer.index, own, hidden)
        with decoder.roomy(layer.index):
            scaled = split(decoder.files.below(layer.prefix), whole.linears) if whole else {}
            tensors = join(scaled | layer.tensors, (whole or layer.structure).linears)
        with decoder.layer(layer.index, tensors) as own:
            after = decoder.everything(layer.index, own, hidden)
    pairs = zip(before, after, strict=True)
    far = max(((a - b).abs().amax() / b.abs().amax().clamp(min=1e-12)).item() for b, a in pairs if b.numel())
    if not far <= CHANGED:  # also if it is not a number
        sources = ", ".join(dict.fromkeys(pair.name for pair in layer.scaled))
        raise TaskError(
            f"scaling {layer.prefix}* changed what it makes, by {far:.2g} of its largest number (sources: {sources}); "
            "this is an error of modelpress: report it, and set scaling to none until it is fixed"
        )


def check_solved(layer: Layer, solved: Mapping[str, QuantizedWeight]) -> None:
    """TaskError if a quantized weight is not that of its linear layer. solved: what is about to be written."""
    for name, weight in solved.items():
        right = layer.weight(name)
        found = weight.weight().to(right)
        far = ((found - right).norm() / right.norm().clamp(min=1e-12)).item() if found.shape == right.shape else 2.0
        if not far <= STRANGE:
            raise TaskError(
                f"the weight for {layer.prefix}{name} is another's: it differs by {far:.2g} of its size; this is "
                "an error of modelpress: report it"
            )


@lru_cache(maxsize=1)
def _decoder(source: Path, device: str) -> tuple[Decoder, Tensor]:
    """The source's layers, and numbers of the size that hidden states have."""
    decoder = Decoder(source, torch.float32, device)
    ids = torch.arange(TOKENS)[None] % decoder.config.vocab_size
    (hidden,) = decoder.embed([ids])
    draw = torch.Generator().manual_seed(0)
    return decoder, torch.randn(hidden.shape, generator=draw).to(hidden)
