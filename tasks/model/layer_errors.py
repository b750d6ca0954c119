"""The relative output error of each quantized layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tasks.device import compute_device
from tasks.formats.stored import StoredModel
from tasks.model.decoder import Decoder
from tasks.model.linears import Linear, join
from tasks.model.rounding import rounded_products
from tasks.model.stored_places import read_places
from tasks.tensor_files import OUTPUT


def layer_errors(model: Path, pressed: Path, tokens: Tensor) -> dict[str, float]:
    """Relative error of each decoder layer's contribution to its output, on the baseline's input.

    tokens: int64 [sequences, length]. The error of layer f quantized to g is |g(x) - f(x)| / |f(x) - x|, over all
    tokens: it excludes errors of earlier layers, and is comparable between methods that rescale inside a layer and
    those that do not. For a quantized output layer it is the error of the logits. One layer of each model is in memory
    at a time.
    """
    device = compute_device()
    base = Decoder(model, torch.float32, device)
    stored = StoredModel(pressed)
    hidden = base.embed(list(tokens.split(1)))
    found = {}
    places = read_places(pressed)
    for index in base.order:
        prefix, origins = base.layer_prefix(index), base.origins(index)
        twin_state, rounding = _dense(stored, prefix, places)
        with base.layer(index) as layer:
            outputs = [base.run(index, layer, batch, number) for number, batch in enumerate(hidden)]
        with base.layer(index, twin_state) as layer, rounded_products(layer, origins.holds, rounding):
            twins = [base.run(index, layer, batch, number) for number, batch in enumerate(hidden)]
        error = sum((twin - out).double().pow(2).sum().item() for twin, out in zip(twins, outputs, strict=True))
        size = sum((out - before).double().pow(2).sum().item() for out, before in zip(outputs, hidden, strict=True))
        found[f"layers.{index}"] = round((error / size) ** 0.5, 6) if size else 0.0
        hidden = outputs
    if OUTPUT in stored.quantized:
        found[OUTPUT] = _output_error(base, stored, hidden)
    return found


def _output_error(base: Decoder, stored: StoredModel, hidden: list[Tensor]) -> float:
    """The relative error of the logits with only the output layer quantized."""
    twin = stored.weights(OUTPUT).to(base.device)
    error = size = 0.0
    with base.states() as states:
        read = [states(batch) for batch in hidden]
    with base.head() as head:
        for batch, x in zip(hidden, read, strict=True):
            logits = head(batch)
            error += (nn.functional.linear(x, twin) - logits).double().square().sum().item()
            size += logits.double().square().sum().item()
    return round(float((error / size) ** 0.5), 6)


def _dense(stored: StoredModel, prefix: str, places: Mapping[str, Linear]) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """A layer's dequantized tensors, float32, by the rest of the name on disk; and for each linear layer with quantized
    inputs, whether they are symmetric."""
    dense = {name: stored.tensor(name).float() for name in stored.dense if name.startswith(prefix)}
    rounding = {}
    for name in (name for name in stored.quantized if name.startswith(prefix)):
        linear = stored.linear(name)
        dense[f"{name}.weight"] = linear.weight.weight()
        if linear.precision.symmetric_activations is not None:
            rounding[name.removeprefix(prefix)] = linear.precision.symmetric_activations
    return {name.removeprefix(prefix): tensor for name, tensor in join(dense, places).items()}, rounding
