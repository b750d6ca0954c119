"""AutoAWQ's packed weights, compared with AutoAWQ's own dequantization."""

from __future__ import annotations

import pytest
import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm

from tasks.formats.awq import Awq, unpack_columns
from tasks.grid import QuantizedWeight

ROWS, WIDTH, GROUP = 32, 64, 32


def packed_layer() -> tuple[WQLinear_GEMM, torch.Tensor]:
    """A layer packed by AutoAWQ from random integers, and its exact dequantized weight."""
    random = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 16, (ROWS, WIDTH), generator=random)
    zeros = torch.randint(0, 16, (ROWS, WIDTH // GROUP), generator=random)
    scales = (torch.rand(ROWS, WIDTH // GROUP, generator=random) + 0.5).half()
    weight = (integers - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)
    linear = torch.nn.Linear(WIDTH, ROWS, bias=False)
    linear.weight.data = weight.half()
    layer = WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous().float()
    )
    return layer, weight


def unpacked(layer: WQLinear_GEMM) -> QuantizedWeight:
    return Awq().unpack("a", {end: getattr(layer, end) for end in Awq.parts}, {}).weight


def test_the_weight_is_exact() -> None:
    layer, weight = packed_layer()
    assert torch.equal(unpacked(layer).weight(), weight)


def test_weight_equals_autoawqs_dequantized_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq.modules.linear.gemm.TRITON_AVAILABLE", False)  # its CPU path
    layer, _ = packed_layer()
    theirs = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, GROUP).T
    ours = unpacked(layer).weight().half()
    assert torch.equal(ours, theirs)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).half()
    torch.testing.assert_close(torch.nn.functional.linear(x, ours), layer(x), rtol=2e-3, atol=2e-2)


def test_unpacking_reads_every_bit() -> None:
    # the highest position of a word is negative in int32
    assert unpack_columns(torch.tensor([[-1]], dtype=torch.int32)).tolist() == [[15] * 8]
    assert unpack_columns(torch.tensor([[0x76543210]], dtype=torch.int32)).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
