"""Combinations of schemes and methods, mixtures with quantized activations, and the output layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tasks.activation_rounding import Activations, dequantized
from tasks.activations.store import load_statistics
from tasks.errors import TaskError
from tasks.export import export
from tasks.formats.stored import StoredModel
from tasks.quantize import QuantizeReport
from tasks.quantizers.identity import identity
from tasks.runtimes import load_runtime
from tasks.runtimes.dense import load_dense
from tasks.solvers import output_error
from tasks.tensor_files import EMBEDDING, OUTPUT
from tests.functional.pressing import Pressing, settings
from tests.mixed import untied
from tests.tiny import Corpus

GPTQ = {"scheme": "W4A16_ASYM", "group_size": 32, "clip": True, "rounding": "gptq", "refine": 1}


@pytest.fixture(scope="module")
def tied(llama: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Pressing:
    return Pressing.create(llama, corpus, tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def apart(llama: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Pressing:
    """A model with an untied output layer."""
    folder = tmp_path_factory.mktemp("apart")
    return Pressing.create(untied(llama, folder / "model"), corpus, folder)


@pytest.mark.parametrize(
    ("values", "loss"),
    [
        ({"scheme": "W8A16", "group_size": 32}, 1.01),
        ({"scheme": "W4A16", "group_size": 32, "scaling": "smoothquant", "smoothing": 0.5, "rounding": "gptq"}, 1.15),
        ({"scheme": "W8A8", "scaling": "awq", "clip": True, "rounding": "gptq", "refine": 2}, 1.03),
        ({"scheme": "W4A16", "group_size": 32, "rounding": "gptq", "propagate": True}, 1.15),
        ({"scheme": "W8A8", "scaling": "smoothquant", "smoothing": 0.5, "rounding": "gptq", "propagate": True}, 1.03),
        ({**GPTQ, "scale_dtype": "float32"}, 1.15),
    ],
    ids=lambda value: (
        "-".join(str(value.get(key)) for key in ("scheme", "scaling", "propagate")) if isinstance(value, dict) else None
    ),
)
def test_schemes_and_methods_combine(values: dict[str, Any], loss: float, tied: Pressing, tmp_path: Path) -> None:
    report = tied.press(values, tmp_path / "out")
    baseline, result = tied.perplexity(tied.model), tied.perplexity(tmp_path / "out")
    assert baseline != result < baseline * loss
    stored, asked = StoredModel(tmp_path / "out"), settings(values).precision
    assert len(stored.quantized) == 14
    for name in stored.quantized:
        found = stored.linear(name)
        assert (found.precision.grid.bits, found.precision.grid.symmetric) == (asked.bits, asked.symmetric)
        assert found.weight.group_size == (asked.group_size or found.weight.integers.shape[1])
        assert found.precision.symmetric_activations == asked.symmetric_activations
    assert (report.scheme, report.bits, report.output_layer) == (values["scheme"], asked.bits, None)
    dtype = values.get("scale_dtype", "bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype


CANDIDATES = ["W4A16_ASYM@64", "W8A8", "none"]
MIXED = {
    "scheme": "mixed",
    "candidates": CANDIDATES,
    "fused": True,
    "bits_per_weight": 7.0,
    "symmetric_activations": False,
    "scale_dtype": "float16",
    "scaling": "awq",
    "smoothing": 0.5,
    "clip": True,
    "rounding": "gptq",
    "refine": 1,
}


# all three precisions in both layers, shared by fused layers; on a model so small 8 bits are almost as good as 16, so
# no budget would choose all three
CHOICE = {
    "0.self_attn.q_proj": "W4A16_ASYM@64",
    "0.self_attn.k_proj": "W4A16_ASYM@64",
    "0.self_attn.v_proj": "W4A16_ASYM@64",
    "0.self_attn.o_proj": "none",
    "0.mlp.gate_proj": "W8A8",
    "0.mlp.up_proj": "W8A8",
    "0.mlp.down_proj": "W4A16_ASYM@64",
    "1.self_attn.q_proj": "W8A8",
    "1.self_attn.k_proj": "W8A8",
    "1.self_attn.v_proj": "W8A8",
    "1.self_attn.o_proj": "W4A16_ASYM@64",
    "1.mlp.gate_proj": "none",
    "1.mlp.up_proj": "none",
    "1.mlp.down_proj": "W8A8",
}


@pytest.fixture(scope="module")
def mixed(tied: Pressing, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantizeReport]:
    """A model whose layers have all three precisions, and its report."""
    folder = tmp_path_factory.mktemp("mixed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        choice = {f"model.layers.{name}": label for name, label in CHOICE.items()}
        patch.setattr("tasks.quantizers.mixed.choose", lambda *_: choice)
        return folder, tied.press(MIXED, folder)


def chosen(report: QuantizeReport) -> dict[str, str]:
    return {entry["name"]: entry["chosen"] for entry in report.linears}


def test_mixture_has_the_chosen_precisions(mixed: tuple[Path, QuantizeReport]) -> None:
    folder, report = mixed
    stored, found = StoredModel(folder), chosen(report)
    assert set(found.values()) == set(CANDIDATES)
    assert len(found) == 14
    for name, label in found.items():
        assert (name in stored.quantized) == (label != "none")
        if label == "none":
            assert stored.tensor(f"{name}.weight").dtype == torch.float16
            continue
        own = stored.linear(name).precision
        assert own.grid.bits == (8 if label == "W8A8" else 4)
        assert own.symmetric_activations is (False if label == "W8A8" else None)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"pack-quantized", "int-quantized"}


@pytest.mark.parametrize("zero", ["layers.1.", "layers.1.mlp.up_proj"])
def test_layers_of_zeros_stay_zeros(zero: str, llama: Path, corpus: Corpus, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if zero in name:
            weights[name].zero_()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    tied = Pressing.create(model, corpus, tmp_path)
    baseline = tied.perplexity(tied.model)
    for number, values in enumerate((MIXED, GPTQ, {"scheme": "W8A8", "scaling": "smoothquant", "smoothing": 0.5})):
        tied.press(values, tmp_path / str(number))
        assert tied.perplexity(tmp_path / str(number)) < 1.05 * baseline
        stored = StoredModel(tmp_path / str(number))
        zeros = [name for name in stored.quantized if zero in f"{name}."]
        assert zeros
        assert not any(stored.linear(name).weight.weight().any() for name in zeros)


def test_fused_layers_share_a_scheme(tied: Pressing, tmp_path: Path) -> None:
    report = tied.press(MIXED, tmp_path / "out")
    found = chosen(report)
    assert {"W4A16_ASYM@64", "W8A8"} <= set(found.values())
    assert report.bits_per_weight is not None
    assert 6.5 < report.bits_per_weight <= 7.0
    for first, *others in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for name in (name for name in found if name.endswith(first)):
            assert {found[name.replace(first, other)] for other in others} == {found[name]}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(ids).logits
    return found


def test_transformers_loads_a_mixture_with_the_stored_weights(
    tied: Pressing, mixed: tuple[Path, QuantizeReport], capfd: pytest.CaptureFixture[str]
) -> None:
    """Loaded as is, and in our runtime: 4-bit weights dequantized, inputs of only W8A8 layers rounded."""
    folder, _ = mixed
    ids = tied.text[:4]
    ours = logits(load_dense(folder, torch.float32), ids)
    theirs = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    runtime = load_runtime("transformers", folder, "float32")
    # activations half-way between two integers may round either way
    for found in (theirs, runtime.logprobs(ids)):
        assert (found.log_softmax(-1) - ours.log_softmax(-1)).abs().mean() < 1e-3
    assert not runtime.fast
    assert runtime.note
    assert "Could not match" not in capfd.readouterr().err
    assert tied.perplexity(folder) < 1.05 * tied.perplexity(tied.model)


def test_in_a_mixture_only_w8a8_layers_round_their_inputs(mixed: tuple[Path, QuantizeReport]) -> None:
    """compressed-tensors rounds like our own code."""
    folder, report = mixed
    stored, model = StoredModel(folder), load_runtime("transformers", folder, "float32").model  # type: ignore[attr-defined]
    seen = set()
    for name, label in chosen(report).items():
        layer = model.get_submodule(name)
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
        x[..., 3] *= 50  # an outlier, so that rounding shows
        rounded = dequantized(Activations(symmetric=False), x)
        plain, other = (nn.functional.linear(each, stored.weights(name)) for each in (x, rounded))
        with torch.inference_mode():
            found = layer(x)
        expected, wrong = (other, plain) if label == "W8A8" else (plain, other)
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert (found - wrong).norm() > 1e-3 * wrong.norm()
        seen.add(label)
    assert seen == set(CANDIDATES)


def test_a_mixture_may_skip_layers(tied: Pressing, tmp_path: Path) -> None:
    report = tied.press({**MIXED, "skip_layers": [1]}, tmp_path / "out")
    stored = StoredModel(tmp_path / "out")
    assert set(chosen(report)) == {name for name in tied_linears(stored) if ".layers.0." in name}
    assert not [name for name in stored.quantized if ".layers.1." in name]
    original = load_file(tied.model / "model.safetensors")
    for name in stored.dense:
        if ".layers.1." in name:
            assert torch.equal(stored.tensor(name), original[name].half())
    ids = tied.text[:4]
    ours = logits(load_dense(tmp_path / "out", torch.float32), ids).log_softmax(-1)
    found = load_runtime("transformers", tmp_path / "out", "float32").logprobs(ids)
    assert (found - ours).abs().mean() < 1e-3


def tied_linears(stored: StoredModel) -> set[str]:
    names = {*stored.quantized, *(name.removesuffix(".weight") for name in stored.dense)}
    return {name for name in names if name.endswith("_proj")}


@pytest.mark.parametrize("values", [GPTQ, MIXED], ids=["W4A16_ASYM", "mixed"])
@pytest.mark.parametrize("precision", ["W8A16@64", "W4A16_ASYM@32"])
def test_the_output_layer_of_an_untied_model_is_solved_and_loads_in_transformers(
    precision: str, values: dict[str, Any], apart: Pressing, tmp_path: Path
) -> None:
    report = apart.press({**values, "output_layer": precision}, tmp_path / "out")
    assert report.output_layer == precision
    assert report.output_layer_error is not None
    assert 0 < report.output_layer_error < 0.2
    assert set(report.layers) == {"layers.0", "layers.1"}
    assert OUTPUT in StoredModel(tmp_path / "out").quantized
    export(tmp_path / "out", "transformers", tmp_path / "export")
    ids = apart.text[:4]
    ours = logits(load_dense(tmp_path / "export", torch.float32), ids).log_softmax(-1)
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32), ids)
    for found in (theirs.log_softmax(-1), load_runtime("transformers", tmp_path / "export", "float32").logprobs(ids)):
        assert (found - ours).abs().mean() < 1e-3
    baseline = apart.perplexity(apart.model)
    assert baseline != apart.perplexity(tmp_path / "export") < 1.25 * baseline


def test_gptq_solves_the_output_layer_better_than_nearest(apart: Pressing, tmp_path: Path) -> None:
    known = load_statistics(apart.statistics, None, "cpu")[OUTPUT].gram
    weight = load_file(apart.model / "model.safetensors")[f"{OUTPUT}.weight"].float()
    errors = {}
    for rounding in ("nearest", "gptq"):
        values = {"scheme": "W8A8", "rounding": rounding, "output_layer": "W4A16_ASYM@32"}
        report = apart.press(values, tmp_path / rounding)
        solved = StoredModel(tmp_path / rounding).weights(OUTPUT)
        errors[rounding] = float(output_error(solved - weight, known).sum())
        errors[f"{rounding} measured"] = report.output_layer_error or 0.0
    assert errors["gptq"] < 0.7 * errors["nearest"]
    assert errors["gptq measured"] < errors["nearest measured"]


def test_identity_includes_the_output_layers_precision(tied: Pressing) -> None:
    folders, libraries = [tied.model, tied.calibration], {"torch": "1"}
    found = [
        identity(settings({**GPTQ, **changes}), folders, libraries)
        for changes in ({}, {"output_layer": "W8A16@64"}, {"output_layer": "W8A16@32"}, {"embedding": "W8A16@64"})
    ]
    assert len(set(found)) == 4


@pytest.mark.parametrize("precision", ["W8A16@64", "W4A16_ASYM@32"])
def test_a_tied_output_layer_is_for_targets_that_can_untie_it(precision: str, tied: Pressing, tmp_path: Path) -> None:
    """Embedding and output layer share the integers."""
    report = tied.press({**GPTQ, "output_layer": precision}, tmp_path / "out", "onnx")
    assert (report.output_layer, (report.output_layer_error or 0) > 0) == (precision, True)
    stored = StoredModel(tmp_path / "out")
    assert OUTPUT in stored.quantized
    assert f"{EMBEDDING}.weight" not in stored.dense
    with pytest.raises(
        TaskError, match=r"the output layer of .*out is quantized, but the model ties the output layer to"
    ):
        export(tmp_path / "out", "transformers", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    export(tmp_path / "out", "onnx", tmp_path / "export")
    ids = tied.text[:4]
    ours = logits(load_dense(tmp_path / "out", torch.float32), ids).log_softmax(-1)
    found = load_runtime("onnx", tmp_path / "export", "float32").logprobs(ids)
    assert (ours.exp() * (ours - found)).sum(-1).mean() < 0.01  # the kernels round activations
    baseline = tied.perplexity(tied.model)
    assert baseline != tied.perplexity(tmp_path / "export", "onnx") < 1.25 * baseline


def test_an_embedding_is_for_targets_that_look_up_integers(apart: Pressing, tmp_path: Path) -> None:
    report = apart.press({**GPTQ, "embedding": "W8A16@64"}, tmp_path / "out", "onnx")
    assert (report.output_layer, report.output_layer_error) == (None, None)
    stored = StoredModel(tmp_path / "out")
    assert EMBEDDING in stored.quantized
    assert f"{OUTPUT}.weight" in stored.dense
    with pytest.raises(TaskError, match=r"the embedding of .*out is quantized, but Transformers and vLLM look up"):
        export(tmp_path / "out", "transformers", tmp_path / "refused")
    export(tmp_path / "out", "onnx", tmp_path / "export")
    baseline = apart.perplexity(apart.model)
    assert baseline != apart.perplexity(tmp_path / "export", "onnx") < 1.2 * baseline
    dense: Any = load_dense(tmp_path / "out", torch.float32)
    weight = load_file(apart.model / "model.safetensors")[f"{EMBEDDING}.weight"].float()
    change = dense.get_input_embeddings().weight - weight
    assert 0 < change.norm() < 0.02 * weight.norm()
