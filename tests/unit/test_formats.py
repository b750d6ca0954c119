"""Packers: what their engines unpack is what was solved, bit by bit."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from tasks.formats.autogptq import autogptq_config, pack_autogptq, unpack_autogptq
from tasks.formats.awq_gemm import pack, pack_gemm, unpack, unpack_gemm
from tasks.formats.compressed import (
    bytes_config,
    pack_bytes,
    pack_words,
    unpack_bytes,
    unpack_words,
    words_config,
)
from tasks.grid import Grid, QuantizedWeight

ROWS, WIDTH, GROUP = 64, 128, 32


def solved(bits: int = 4, group: int = GROUP) -> QuantizedWeight:
    random = torch.Generator().manual_seed(0)
    groups = WIDTH // group
    return QuantizedWeight(
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


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    pairs = ((one.integers, other.integers), (one.scales.float(), other.scales.float()), (one.zeros, other.zeros))
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_read_back_is_what_was_solved(bits: int, symmetric: bool) -> None:
    one = solved(bits)
    if symmetric:
        one = QuantizedWeight(one.integers, one.scales, torch.full_like(one.zeros, 2 ** (bits - 1)))
    found, width = unpack_words(pack_words(one, Grid(bits, GROUP, symmetric, torch.float16)))
    assert (width, same(found, one)) == (bits, True)
    shifted = QuantizedWeight(one.integers, one.scales, one.zeros.clamp(min=1))
    packed = pack_autogptq(shifted, bits)
    assert packed["qweight"].shape == (WIDTH * bits // 32, ROWS)
    assert packed["qzeros"].shape == (WIDTH // GROUP, ROWS * bits // 32)
    assert same(unpack_autogptq(packed["qweight"], packed["qzeros"], packed["scales"], bits), shifted)


def test_what_is_read_back_of_bytes_and_gemm_is_what_was_solved() -> None:
    row = solved(bits=8, group=WIDTH)
    row = QuantizedWeight(row.integers, row.scales, torch.full_like(row.zeros, 128))
    packed = pack_bytes(row)
    assert same(unpack_bytes(packed["weight"], packed["weight_scale"]), row)
    one = solved()
    assert same(unpack_gemm(**pack_gemm(one)), one)
    assert torch.equal(unpack(pack(one.integers)), one.integers)


def test_a_layout_without_a_place_for_zero_refuses_it() -> None:
    one = solved()
    assert not one.zeros.all()
    with pytest.raises(ValueError, match="least_zero=1"):
        pack_autogptq(one, 4)


def test_the_descriptions_name_what_was_done() -> None:
    words = words_config({"a": Grid(4, GROUP, False, torch.float16)}, act_order=True, ignore=["lm_head"])
    weights = words["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, GROUP, False)
    assert (words["format"], words["quant_method"], words["quantization_status"]) == (
        "pack-quantized",
        "compressed-tensors",
        "compressed",
    )
    inputs = bytes_config(True, [])["config_groups"]["group_0"]["input_activations"]
    assert (inputs["symmetric"], inputs["dynamic"], inputs["strategy"]) == (True, True, "token")


def test_of_several_grids_every_layer_is_named() -> None:
    coarse, fine = Grid(4, GROUP, False, torch.float16), Grid(8, GROUP, True, torch.float16)
    words = words_config({"a": coarse, "b": fine, "c": coarse}, act_order=True, ignore=[])
    found = {group["weights"]["num_bits"]: group["targets"] for group in words["config_groups"].values()}
    assert found == {4: ["a", "c"], 8: ["b"]}


def test_gptqmodel_finds_itself_named_in_autogptqs_layout() -> None:
    """It refuses zero points from any other maker: for it, that is 0.9.0 or newer (quantization/config.py there)."""
    config = autogptq_config(Grid(4, 32, False, torch.float16), act_order=True, damping=0.05)
    makers = dict(one.split(":") for one in config["meta"]["quantizer"])
    assert tuple(int(part) for part in makers["gptqmodel"].split(".")) >= (0, 9, 0)
    assert makers["modelpress"] == version("modelpress")
