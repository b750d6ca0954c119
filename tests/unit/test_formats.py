"""Formats of a model directory: exact round trips, and refused models."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import preset_name_to_scheme

from tasks.errors import TaskError
from tasks.formats import Layout, StoredLinear, load_format
from tasks.grid import Grid, Precision, QuantizedWeight
from tasks.model.layout import precision
from tasks.schemes import SCHEMES, parse_precision, precision_label
from tasks.tensor_files import EMBEDDING, OUTPUT

ROOT = Path(__file__).resolve().parents[2]
ROWS, WIDTH, GROUP = 64, 128, 32
NAME = "model.layers.0.mlp.up_proj"
# the precisions of each format
HELD = {
    "compressed-tensors": ["W4A16@32", "W4A16_ASYM@32", "W4A16_ASYM@128", "W8A16@64", "W8A16@32", "W8A8"],
    "awq": ["W4A16@32", "W4A16_ASYM@32", "W4A16_ASYM@128"],
    "gptq": ["W4A16@32", "W4A16_ASYM@32", "W4A16_ASYM@128", "W8A16@128", "W8A16@32"],
}
CASES = [(form, label) for form, labels in HELD.items() for label in labels]


def asked(form: str, label: str) -> Precision:
    scheme = parse_precision(label)
    assert scheme
    return precision(load_format(form), scheme, torch.float16)


def solved(grid: Grid) -> QuantizedWeight:
    """Random integers covering the grid; zero points as it allows."""
    random = torch.Generator().manual_seed(0)
    groups = grid.groups(WIDTH)
    zeros = torch.randint(grid.least_zero, grid.top + 1, (ROWS, groups), generator=random, dtype=torch.uint8)
    return QuantizedWeight(
        torch.randint(0, grid.top + 1, (ROWS, WIDTH), generator=random, dtype=torch.uint8),
        (torch.rand(ROWS, groups, generator=random) + 0.5).half().to(grid.dtype),
        torch.full_like(zeros, grid.middle) if grid.symmetric else zeros,
    )


def layout(precisions: dict[str, Precision], **changes: Any) -> Layout:
    return Layout(dict.fromkeys(precisions, (ROWS, WIDTH)), precisions, **changes)


def of_the_row(grid: Grid) -> Grid:
    """The same grid with group_size None for a group of the whole row: some formats do not distinguish the two."""
    return replace(grid, group_size=None) if grid.groups(WIDTH) == 1 else grid


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    pairs = ((one.integers, other.integers), (one.scales, other.scales), (one.zeros, other.zeros))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def round_trip(form: str, precisions: dict[str, Precision], name: str, one: QuantizedWeight) -> StoredLinear:
    """Pack and unpack, with the configuration through JSON."""
    found = load_format(form)
    config = json.loads(json.dumps(found.describe(layout(precisions))))
    found.check_config(config, "here")
    return found.unpack(name, found.pack(one, precisions[name]), config)


@pytest.mark.parametrize(("form", "label"), CASES)
def test_round_trip_is_exact(form: str, label: str) -> None:
    own = asked(form, label)
    one = solved(own.grid)
    load_format(form).check(layout({NAME: own}))
    found = round_trip(form, {NAME: own}, NAME, one)
    assert same(found.weight, one)
    assert found.precision.symmetric_activations == own.symmetric_activations
    expected = own.grid
    if form == "awq":  # always has zero points
        assert not found.precision.grid.symmetric
        expected = Grid(4, own.grid.group_size, False, torch.float16)
    assert of_the_row(found.precision.grid) == of_the_row(expected)


@pytest.mark.parametrize(("form", "label"), CASES)
def test_a_format_knows_its_parts_and_the_shape(form: str, label: str) -> None:
    own, found = asked(form, label), load_format(form)
    tensors = found.pack(solved(own.grid), own)
    assert tensors.keys() <= set(found.parts)
    assert found.shape({end: tensor.shape for end, tensor in tensors.items()}, tensors.__getitem__) == (ROWS, WIDTH)


@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_rounding_is_stored(symmetric: bool) -> None:
    way = Precision(asked("compressed-tensors", "W8A8").grid, symmetric)
    found = round_trip("compressed-tensors", {NAME: way}, NAME, solved(way.grid))
    assert found.precision == way


def test_compressed_tensors_mixes_precisions() -> None:
    precisions = {
        f"model.layers.{number}.mlp.up_proj": asked("compressed-tensors", label)
        for number, label in enumerate([*HELD["compressed-tensors"], "W4A16_ASYM@32"])
    }
    for name, own in precisions.items():
        one = solved(own.grid)
        found = round_trip("compressed-tensors", precisions, name, one)
        assert same(found.weight, one)
        assert of_the_row(found.precision.grid) == of_the_row(own.grid)
        assert found.precision.symmetric_activations == own.symmetric_activations
    groups = load_format("compressed-tensors").describe(layout(precisions))["config_groups"].values()
    targets = [name for group in groups for name in group["targets"]]
    assert sorted(targets) == sorted(precisions)
    assert len(groups) == len(precisions) - 1
    kinds = {group["format"] for group in groups}
    assert kinds == {"pack-quantized", "int-quantized"}


@pytest.mark.parametrize(
    ("form", "precisions", "changes", "message"),
    [
        ("awq", {NAME: "W8A16@32"}, {}, "awq does not support 8 bits; set format to compressed-tensors"),
        ("awq", {NAME: "W8A8"}, {}, "awq does not support rounded activations; set format to compressed-tensors"),
        ("gptq", {NAME: "W8A8"}, {}, "gptq does not support rounded activations; set format to compressed-tensors"),
        ("awq", {NAME: "W4A16_ASYM@32", "b": "W4A16_ASYM@64"}, {}, "different precisions.*set format to compressed-t"),
        ("gptq", {NAME: "W4A16_ASYM@32", "b": "W8A16@32"}, {}, "different precisions.*set format to compressed-t"),
        ("awq", {NAME: "W4A16@32", OUTPUT: "W4A16@32"}, {}, "of lm_head is set, but the format awq .*leave it out"),
        ("gptq", {NAME: "W4A16@32", OUTPUT: "W4A16@32"}, {}, "of lm_head is set, but the format gptq .*leave it out"),
        ("awq", {NAME: "W4A16@32", EMBEDDING: "W4A16@32"}, {}, r"of model\.embed_tokens is set, but the format awq"),
        (
            "gptq",
            {NAME: "W4A16@32"},
            {"skipped": ["model.layers.1."]},
            "skip_layers is set.*to compressed-tensors or awq",
        ),
        ("awq", {NAME: "W4A16@96"}, {}, f"96, which does not divide the width 128 of {NAME}; .*: 16, 32, 64, 128;"),
        ("gptq", {NAME: "W4A16@96"}, {}, f"96, which does not divide the width 128 of {NAME}; .*: 16, 32, 64, 128;"),
        ("compressed-tensors", {NAME: "W4A16@72"}, {}, f"72, which does not divide the width 128 of {NAME}; sizes"),
        ("compressed-tensors", {OUTPUT: "W8A16@72"}, {}, "72, which does not divide the width 128 of lm_head; sizes"),
    ],
)
def test_unsupported_precisions_are_refused_with_a_remedy(
    form: str, precisions: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        load_format(form).check(layout({name: asked(form, label) for name, label in precisions.items()}, **changes))


@pytest.mark.parametrize(("form", "rows", "together"), [("awq", 48, 32), ("gptq", 60, 8)])
def test_rows_that_do_not_fill_a_word_are_refused(form: str, rows: int, together: int) -> None:
    one = Layout({NAME: (rows, WIDTH)}, {NAME: asked(form, "W4A16@32")})
    with pytest.raises(
        TaskError, match=f"{NAME} has {rows} rows, and the format {form} packs {together} at a time; set"
    ):
        load_format(form).check(one)


@pytest.mark.parametrize("form", ["awq", "gptq"])
def test_formats_with_float16_scales_refuse_other_dtypes(form: str) -> None:
    assert load_format(form).scale_dtype(torch.bfloat16, None) == torch.float16
    with pytest.raises(TaskError, match=f"scale_dtype is bfloat16, but the format {form} stores float16"):
        load_format(form).scale_dtype(torch.bfloat16, torch.bfloat16)
    assert load_format("compressed-tensors").scale_dtype(torch.bfloat16, None) == torch.bfloat16
    assert load_format("compressed-tensors").scale_dtype(torch.bfloat16, torch.float32) == torch.float32


def test_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TaskError, match=r"no format 'marlin' .*: compressed-tensors, awq, gptq"):
        load_format("marlin")


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        ("awq", {"bits": 8, "version": "gemm"}, "is AWQ with bits=8, version=gemm; only 4 bits in GEMM layout are"),
        ("awq", {"bits": 4, "version": "gemv"}, "is AWQ with bits=4, version=gemv"),
        ("gptq", {"desc_act": True}, "is GPTQ with desc_act=true"),
        ("compressed-tensors", {"format": "marlin-24"}, "holds compressed-tensors of the unsupported kind marlin-24"),
    ],
)
def test_a_directory_of_another_kind_is_refused(form: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=f"here {message}"):
        load_format(form).check_config(config, "here")


@pytest.mark.parametrize("symmetric", [True, False])
def test_words_hold_every_integer(symmetric: bool) -> None:
    """Unpacked by compressed-tensors."""
    own = asked("compressed-tensors", "W4A16@32" if symmetric else "W4A16_ASYM@32")
    one = solved(own.grid)
    packed = load_format("compressed-tensors").pack(one, own)
    assert packed["weight_packed"].shape == (ROWS, WIDTH // 8)
    found = unpack_from_int32(packed["weight_packed"], 4, torch.Size(packed["weight_shape"].tolist()))
    assert torch.equal(found + 8, one.integers)
    if symmetric:
        assert "weight_zero_point" not in packed
    else:
        shape = torch.Size(one.zeros.shape)
        assert torch.equal(unpack_from_int32(packed["weight_zero_point"], 4, shape, packed_dim=0) + 8, one.zeros)


def test_bytes_hold_every_integer() -> None:
    own = asked("compressed-tensors", "W8A8")
    one = solved(own.grid)
    packed = load_format("compressed-tensors").pack(one, own)
    assert packed["weight"].dtype == torch.int8
    assert torch.equal(packed["weight"].int() + 128, one.integers.int())
    assert packed["weight_scale"].dtype == torch.float32


def test_autogptq_packs_along_the_inputs() -> None:
    own = asked("gptq", "W8A16@32")
    packed = load_format("gptq").pack(solved(own.grid), own)
    assert packed["qweight"].shape == (WIDTH * 8 // 32, ROWS)
    assert packed["qzeros"].shape == (WIDTH // GROUP, ROWS * 8 // 32)
    assert packed["g_idx"].tolist() == [column // GROUP for column in range(WIDTH)]


def test_layout_that_cannot_store_a_zero_point_of_0_refuses_it() -> None:
    own = Precision(Grid(4, GROUP, False, torch.float16))
    one = solved(own.grid)
    assert not one.zeros.all()
    with pytest.raises(ValueError, match="least_zero=1"):
        load_format("gptq").pack(one, own)


def test_configs_describe_the_quantization() -> None:
    form = load_format("compressed-tensors")
    words = form.describe(layout({NAME: asked("compressed-tensors", "W4A16_ASYM@32")}, act_order=True))
    (group,) = words["config_groups"].values()
    weights = group["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, GROUP, False)
    assert (weights["actorder"], group["targets"], words["ignore"]) == ("static", ["Linear"], [OUTPUT])
    assert (words["format"], words["quant_method"], words["quantization_status"]) == (
        "pack-quantized",
        "compressed-tensors",
        "compressed",
    )
    integers = form.describe(layout({NAME: asked("compressed-tensors", "W8A8")}))
    inputs = integers["config_groups"]["group_0"]["input_activations"]
    assert (inputs["symmetric"], inputs["dynamic"], inputs["strategy"]) == (True, True, "token")
    assert integers["format"] == "int-quantized"


def test_mixed_config_names_every_layer_and_the_unquantized_ones() -> None:
    coarse, fine = (asked("compressed-tensors", label) for label in ("W4A16_ASYM@32", "W8A16@32"))
    some = layout({"a": coarse, "b": fine, "c": coarse, OUTPUT: fine}, skipped=["model.layers.3."])
    words = load_format("compressed-tensors").describe(
        Layout({**some.shapes, "d": (1, 1)}, some.precisions, ["model.layers.3."])
    )
    found = {group["weights"]["num_bits"]: group["targets"] for group in words["config_groups"].values()}
    assert found == {4: ["a", "c"], 8: ["b", OUTPUT]}
    assert words["ignore"] == [r"re:.*\.layers\.3\..*", "d"]


def test_autogptq_layout_names_gptqmodel_as_maker() -> None:
    """GPTQModel refuses zero points from other makers; it needs 0.9.0 or newer (its quantization/config.py)."""
    config = load_format("gptq").describe(layout({NAME: asked("gptq", "W4A16_ASYM@32")}, act_order=True, damping=0.05))
    makers = dict(one.split(":") for one in config["meta"]["quantizer"])
    assert tuple(int(part) for part in makers["gptqmodel"].split(".")) >= (0, 9, 0)
    assert makers["modelpress"] == "0.1.0"  # constant, so that a model's bytes do not depend on our version
    assert (config["static_groups"], config["damp_percent"], config["sym"]) == (True, 0.05, False)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_the_preset_of_its_name(name: str) -> None:
    ours, preset = SCHEMES[name], preset_name_to_scheme(name, ["Linear"])
    weights, inputs = preset.weights, preset.input_activations
    assert weights is not None
    assert (ours.name, ours.bits, ours.group_size, ours.symmetric) == (
        name,
        weights.num_bits,
        weights.group_size,
        weights.symmetric,
    )
    assert (weights.type, weights.strategy) == ("int", "group" if ours.group_size else "channel")
    assert ours.weight_only == (inputs is None)
    if inputs is None:
        assert (ours.activation_bits, ours.symmetric_activations) == (None, None)
    else:
        assert (ours.activation_bits, ours.symmetric_activations) == (inputs.num_bits, inputs.symmetric)
        assert (inputs.type, inputs.strategy, inputs.dynamic) == ("int", "token", True)


@pytest.mark.parametrize("label", ["W4A16_ASYM@64", "W4A16_ASYM@128", "W8A16@128", "W8A8", "none"])
def test_precision_label_round_trip(label: str) -> None:
    assert precision_label(parse_precision(label)) == label


@pytest.mark.parametrize("text", ["4@64", "W4A16@", "W4A16@x", "W3A16", "none@64", "@64", ""])
def test_invalid_precision_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no precision; write a scheme .*W4A16_ASYM@64, or none"):
        parse_precision(text)


@pytest.mark.parametrize("room", ["exporters", "formats", "runtimes"])
def test_exporters_formats_and_runtimes_have_no_solver(room: str) -> None:
    """Exporters, formats and runtimes use no solver."""
    files = sorted((ROOT / "tasks" / room).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            if names == ["tasks"]:
                names = [f"tasks.{alias.name}" for alias in getattr(node, "names", [])]
            assert not [name for name in names if name.startswith(("tasks.solvers", "tasks.quantizers"))], file
