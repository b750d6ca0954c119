"""W8A8 with integer arithmetic on a CPU: products of 8-bit integers, summed in 32 bits.

Weights: an integer times the scale of its row. Activations: per token, x = (q - zero) * scale, computed at run time
(compressed-tensors' dynamic token strategy). So x W^T = scale_x * scale_w * (q W^T - zero * sum(W)), and the integer
product is exact: the result differs from computing with dequantized values only by float32 rounding.
"""

from __future__ import annotations

from functools import cache

import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy, QuantizationType
from torch import Tensor, nn

from tasks.activation_rounding import Activations

_BITS = 8
_FEW_ROWS = 8
_EXACT_IN_FLOAT32 = 2**24 // 2**14  # number of 8-bit products whose sum is exact in float32


class Int8Linear(nn.Module):
    """A linear layer with integer arithmetic. weight: int8 [out, in], scale: float32 [out]."""

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
        out = integer_product(q, self.weight)
        if zero is not None:
            out.addmm_(zero, self.sums[None], alpha=-1)
        out = out.mul_(scale).mul_(self.scale)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1).to(x.dtype)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """The exact product `a b^T` of int8 [m, k] and int8 [n, k], as float32 [m, n].

    torch's product is fast on processors with 8-bit dot products (VNNI). Elsewhere it is 20 times slower than float32,
    except for a few rows, and wrong where pairs are summed in 16 bits. There, blocks of columns are multiplied exactly
    in float32.
    """
    if torch.cpu._is_vnni_supported() or (len(a) <= _FEW_ROWS and _few_rows_are_exact()):
        return torch._int_mm(a, b.T).float()
    columns = zip(a.split(_EXACT_IN_FLOAT32, -1), b.split(_EXACT_IN_FLOAT32, -1), strict=True)
    blocks: list[Tensor] = [x.float() @ y.float().T for x, y in columns]
    if len(blocks) == 1:
        return blocks[0]
    # the sum of several blocks can exceed float32's exact range
    return torch.stack([block.int() for block in blocks]).sum(0, dtype=torch.int32).float()


@cache
def _few_rows_are_exact() -> bool:
    """Whether torch's product of a few rows is correct for the largest integers."""
    a, b = (torch.full((_FEW_ROWS, 64), least, dtype=torch.int8) for least in (-128, 127))
    return all(torch._int_mm(x, y.T).eq(64 * int(x[0, 0]) * int(y[0, 0])).all() for x in (a, b) for y in (a, b))


def use_integers(model: nn.Module) -> bool:
    """Replace the layers of a W8A8 model that was loaded with dequantized weights; return whether that was possible.

    Returns False and changes nothing if a layer is quantized in another way.
    """
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "quantization_scheme")]
    if not layers or not all(_fits(module.quantization_scheme) for _, module in layers):
        return False
    # one for all layers: it caches a single tensor
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
