"""Integer arithmetic of W8A8: the same results as compressed-tensors' arithmetic on dequantized values."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from tasks.runtimes import w8a8
from tasks.runtimes.w8a8 import Int8Linear, use_integers

CHANNELS, ROWS = 64, 48


def scheme(symmetric: bool, bits: int = 8) -> QuantizationScheme:
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=bits, symmetric=True, strategy="channel"),
        input_activations=QuantizationArgs(num_bits=8, symmetric=symmetric, strategy="token", dynamic=True),
    )


class Pair(nn.Module):
    """Two layers with the same input, as loaded: weights on the grid, with their scales."""

    def __init__(self, way: QuantizationScheme, bias: bool = False) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.first, self.second = (nn.Linear(CHANNELS, ROWS, bias=bias) for _ in range(2))
        for layer in (self.first, self.second):
            scale = torch.rand(ROWS, 1, generator=random) + 0.01
            layer.weight.data = torch.randint(-128, 128, (ROWS, CHANNELS), generator=random) * scale
            layer.weight_scale = nn.Parameter(scale)
            layer.quantization_scheme = way

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.first(x) + self.second(x)
        return total


def activations(*shape: int) -> Tensor:
    """Like real ones: with outliers, a token of zeros, and a positive token."""
    x = torch.randn(*shape, CHANNELS, generator=torch.Generator().manual_seed(2))
    x[..., 3] *= 50
    x[..., 0, :] = 0
    x[..., -1, :] = x[..., -1, :].abs() + 1
    return x


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 2), (3, 40)])
def test_product_equals_that_of_dequantized_values(symmetric: bool, bias: bool, shape: tuple[int, int]) -> None:
    model, x = Pair(scheme(symmetric), bias), activations(*shape)
    args = scheme(symmetric).input_activations
    assert args is not None
    rounded = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, model.first), args)
    with torch.inference_mode():
        expected = model(rounded)
        assert use_integers(model)
        assert isinstance(model.first, Int8Linear)
        found = model(x)
        other = model(x.flip(0, 1)).flip(0, 1)  # another tensor is not mistaken for the cached one
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert torch.equal(found, other)


def test_other_grids_are_not_replaced() -> None:
    model = Pair(scheme(symmetric=False))
    model.second.quantization_scheme = scheme(symmetric=False, bits=4)
    assert not use_integers(model)
    assert isinstance(model.first, nn.Linear)
    assert not use_integers(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("columns", [64, 1024, 1536, 5000])
def test_integer_product_is_exact(vnni: bool, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without 8-bit instructions; largest sums and random ones."""
    if not torch.cpu._is_vnni_supported() and vnni:
        pytest.skip("this processor has no 8-bit dot products")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    random = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-128, 128, (many, columns), dtype=torch.int8, generator=random) for many in (rows, 40))
    a[0], b[0], b[1] = -128, -128, 127
    assert torch.equal(w8a8.integer_product(a, b), (a.long() @ b.long().T).float())


def test_product_that_is_wrong_on_this_processor_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: right(a, b).clamp(-(2**15), 2**15 - 1))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    w8a8._few_rows_are_exact.cache_clear()
    a = torch.full((1, 64), -128, dtype=torch.int8)
    assert w8a8.integer_product(a, a).item() == 64 * 128 * 128
    w8a8._few_rows_are_exact.cache_clear()
