"""What pressing did to each layer: the error that it adds to what the layer makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tasks.activation_rounding import Activations
from tasks.device import compute_device
from tasks.formats.stored import StoredModel
from tasks.model.decoder import Decoder


def layer_errors(model: Path, pressed: Path, tokens: Tensor) -> dict[str, float]:
    """Relative error of what each decoder layer adds to its input, when it gets the baseline's own input.

    tokens: int64 [sequences, length]. The error of layer f pressed to g is |g(x) - f(x)| / |f(x) - x|, over all tokens:
    no layer is blamed for the ones before it, and methods that rescale inside a layer compare with those that do not.
    One layer of each model is in memory at a time.
    """
    device = compute_device()
    base = Decoder(model, torch.float32, device)
    stored = StoredModel(pressed)
    hidden = base.embed(list(tokens.split(1)))
    found = {}
    for index in range(len(base)):
        twin_state = _dense(stored, base.layer_prefix(index))
        with base.layer(index) as layer:
            outputs = [base.run(index, layer, batch) for batch in hidden]
            layer.load_state_dict({name: tensor.to(device) for name, tensor in twin_state.items()}, assign=True)
            with _rounded_inputs(layer, stored, base.layer_prefix(index)):
                twins = [base.run(index, layer, batch) for batch in hidden]
        error = sum((twin - out).double().pow(2).sum().item() for twin, out in zip(twins, outputs, strict=True))
        size = sum((out - before).double().pow(2).sum().item() for out, before in zip(outputs, hidden, strict=True))
        found[f"layers.{index}"] = round((error / size) ** 0.5, 6) if size else 0.0
        hidden = outputs
    return found


def _dense(stored: StoredModel, prefix: str) -> dict[str, Tensor]:
    """A layer's tensors as numbers, float32, by the rest of their names."""
    dense = {name: stored.tensor(name).float() for name in stored.dense if name.startswith(prefix)}
    linears = (name for name in stored.quantized if name.startswith(prefix))
    dense |= {f"{name}.weight": stored.linear(name).solved.weight() for name in linears}
    return {name.removeprefix(prefix): tensor for name, tensor in dense.items()}


@contextmanager
def _rounded_inputs(layer: nn.Module, stored: StoredModel, prefix: str) -> Iterator[None]:
    """Linear layers read what the pressed model's read: rounded where it rounds activations."""
    symmetric = stored.symmetric_activations
    rounded = Activations(bool(symmetric))

    def rewrite(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = arguments
        integers, scale, zero = rounded(x)
        return (((integers - (0 if zero is None else zero)) * scale).view(x.shape),)

    linears = [] if symmetric is None else stored.quantized
    inside = dict(layer.named_modules())
    own = [inside[name.removeprefix(prefix)] for name in linears if name.startswith(prefix)]
    handles = [module.register_forward_pre_hook(rewrite) for module in own]
    yield
    for handle in handles:
        handle.remove()
