"""W8A8 with integer arithmetic on a CPU: both factors of a product are 8-bit integers, their sum is 32-bit.

Weights: an integer times the scale of its row. Activations: per token, x = (q - zero) * scale, found as the model runs
(compressed-tensors' dynamic token strategy). So x W^T = scale_x * scale_w * (q W^T - zero * sum(W)), and the product of
integers is exact: what differs from computing with the dequantized numbers is rounding in float32 alone.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy, QuantizationType
from torch import Tensor, nn

from tasks.activation_rounding import HIGHEST, LOWEST, Activations

_BITS = 8


class Int8Linear(nn.Module):
    """A linear layer that multiplies integers. weight: int8 [out, in], scale: float32 [out]."""

    weight: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, activations: Activations) -> None:
        super().__init__()
        self.activations = activations
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("sums", weight.sum(-1, dtype=torch.float32))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., in] -> [..., out]."""
        q, scale, zero = self.activations(x)
        out = torch._int_mm(q, self.weight.T).float()
        if zero is not None:
            out.addmm_(zero, self.sums[None], alpha=-1)
        out = out.mul_(scale).mul_(self.scale)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1).to(x.dtype)


def use_integers(model: nn.Module) -> bool:
    """Replace the W8A8 layers of a model loaded with dequantized weights; whether all its quantized layers are such.

    Changes nothing and says no where a layer is quantized in another way, or where this processor gets such a product
    wrong, as one without 8-bit instructions may.
    """
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "quantization_scheme")]
    if not layers or not all(_fits(module.quantization_scheme) for _, module in layers) or not _exact():
        return False
    # one for all layers: it remembers a single tensor
    ways = {symmetric: Activations(symmetric) for symmetric in (False, True)}
    for name, module in layers:
        scale = module.weight_scale.detach().float()
        weight = (module.weight.detach().float() / scale).round_().to(torch.int8)
        bias = None if module.bias is None else module.bias.detach().float()
        activations = ways[bool(module.quantization_scheme.input_activations.symmetric)]
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Int8Linear(weight, scale.flatten(), bias, activations))
    return True


def _fits(scheme: QuantizationScheme) -> bool:
    weights, inputs = scheme.weights, scheme.input_activations
    return (
        weights is not None
        and inputs is not None
        and all(part.type == QuantizationType.INT and part.num_bits == _BITS for part in (weights, inputs))
        and weights.symmetric
        and weights.strategy == QuantizationStrategy.CHANNEL
        and inputs.strategy == QuantizationStrategy.TOKEN
        and inputs.dynamic is True
    )


def _exact() -> bool:
    """Whether the product of the largest integers is right here; where pairs are summed in 16 bits, it is not."""
    for low, high in ((LOWEST, LOWEST), (LOWEST, HIGHEST), (HIGHEST, HIGHEST)):
        a = torch.full((32, 64), low, dtype=torch.int8)
        b = torch.full((64, 32), high, dtype=torch.int8)
        if not torch._int_mm(a, b).eq(64 * low * high).all():
            return False
    return True
