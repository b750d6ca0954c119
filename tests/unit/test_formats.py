"""Packers: what their engines unpack is what was solved, bit by bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from tasks.formats.awq_gemm import pack_gemm
from tasks.formats.compressed import bytes_config, pack_bytes, pack_words, words_config
from tasks.runtimes.awq_format import dequantize, pack, unpack
from tasks.solvers import Grid, Rounded

ROWS, WIDTH, GROUP = 64, 128, 32


def solved(bits: int = 4, group: int = GROUP) -> Rounded:
    random = torch.Generator().manual_seed(0)
    groups = WIDTH // group
    return Rounded(
        torch.randint(0, 2**bits, (ROWS, WIDTH), generator=random, dtype=torch.uint8),
        torch.rand(ROWS, groups, generator=random).half() + 0.5,
        torch.randint(0, 2**bits, (ROWS, groups), generator=random, dtype=torch.uint8),
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_words_hold_every_integer(symmetric: bool) -> None:
    one, grid = solved(), Grid(4, GROUP, symmetric, torch.float16)
    packed = pack_words(one, grid)
    assert packed["weight_packed"].shape == (ROWS, WIDTH // 8)
    found = unpack_from_int32(packed["weight_packed"], 4, torch.Size(packed["weight_shape"].tolist()))
    assert torch.equal(found + 8, one.integers)
    if symmetric:
        assert "weight_zero_point" not in packed
    else:
        shape = torch.Size(one.zeros.shape)
        assert torch.equal(unpack_from_int32(packed["weight_zero_point"], 4, shape, packed_dim=0) + 8, one.zeros)


def test_bytes_hold_every_integer() -> None:
    one = solved(bits=8, group=WIDTH)
    packed = pack_bytes(one)
    assert packed["weight"].dtype == torch.int8
    assert torch.equal(packed["weight"].int() + 128, one.integers.int())
    assert packed["weight_scale"].dtype == torch.float32


def test_gemm_is_what_its_reader_takes_apart() -> None:
    one = solved()
    packed = pack_gemm(one)
    assert torch.equal(dequantize(packed["qweight"], packed["qzeros"], packed["scales"], torch.float32), one.weight())
    assert torch.equal(unpack(pack(one.integers)), one.integers)


def test_the_descriptions_name_what_was_done() -> None:
    words = words_config(Grid(4, GROUP, False, torch.float16), act_order=True, ignore=["lm_head"])
    weights = words["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, GROUP, False)
    assert (words["format"], words["quant_method"], words["quantization_status"]) == (
        "pack-quantized",
        "compressed-tensors",
        "compressed",
    )
    inputs = bytes_config(True, [])["config_groups"]["group_0"]["input_activations"]
    assert (inputs["symmetric"], inputs["dynamic"], inputs["strategy"]) == (True, True, "token")
