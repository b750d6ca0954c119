"""Damage shows: small trained models of new kinds keep their perplexity; the run itself catches planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoTokenizer

from tasks.activations.store import load_statistics
from tasks.errors import TaskError
from tasks.grid import QuantizedWeight
from tasks.output import whole_directory
from tasks.quantize import quantize
from tasks.quantizers import layerwise
from tasks.quantizers.layer import Layer
from tasks.runtimes import load_runtime
from tasks.settings import VariantSettings
from tasks.statistics import collect
from tests.tiny import Corpus, tiny_corpus, tiny_model

LENGTH = 64
VARIANTS = yaml.safe_load(Path("params.yaml").read_text())["variants"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},  # norms of 1 + w, windows, capped logits
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
        "num_key_value_heads": 4,
    },
    "phi3": {"pad_token_id": 2},  # fused projections
}
BOUND = {"int8": 1.03, "gptq": 1.15, "awq": 1.15}
METHODS = {
    "int8": VARIANTS["int8"],
    "gptq": VARIANTS["gptq-int4"] | {"group_size": 32},
    "awq": VARIANTS["awq-int4"] | {"group_size": 32, "format": "compressed-tensors"},
}


def variant(name: str, **changes: Any) -> VariantSettings:
    return VariantSettings.model_validate({**METHODS[name], **changes})


class Pressed:
    """A trained model of a kind, its statistics, and what is made of it."""

    def __init__(self, kind: str, folder: Path, corpus: Corpus) -> None:
        self.folder = folder
        tiny = tiny_model(folder / "tiny", family=kind, steps=60, changes=KINDS[kind])
        with whole_directory(folder / "source") as work:
            for file in tiny.iterdir():
                (work / file.name).write_bytes(file.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        ids = tokenizer(corpus.text.read_text()).input_ids[: 40 * LENGTH]
        with whole_directory(folder / "calibration") as work:
            save_file({"input_ids": torch.tensor(ids).view(-1, LENGTH)}, work / "tokens.safetensors")
        other = tiny_corpus(folder / "other", seed=7).text.read_text()
        self.text = torch.tensor(tokenizer(other).input_ids[: 20 * LENGTH]).view(-1, LENGTH)
        self.report = collect(folder / "source", folder / "calibration", folder / "statistics", importance=True)

    def press(self, name: str, own: VariantSettings) -> Path:
        source, calibration, statistics = (self.folder / part for part in ("source", "calibration", "statistics"))
        self.pressed = quantize(name, own, source, calibration, statistics, self.folder / name)
        return self.folder / name

    def perplexity(self, directory: Path) -> float:
        rows = load_runtime("transformers", directory, "float32").logprobs(self.text)[:, :-1]
        return float(rows.gather(2, self.text[:, 1:, None]).mean().neg().exp())


@pytest.fixture(
    scope="module", params=["qwen3_moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:])]
)
def pressed(request: pytest.FixtureRequest, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Pressed:
    return Pressed(request.param, tmp_path_factory.mktemp(request.param), corpus)


def test_quality_is_kept_and_scaling_does_no_harm(pressed: Pressed) -> None:
    baseline = pressed.perplexity(pressed.folder / "source")
    assert baseline < 20  # the model has learned something that could be lost
    found = {name: pressed.perplexity(pressed.press(name, variant(name))) for name in METHODS}
    for name, result in found.items():
        assert result < baseline * BOUND[name], found
        assert result != baseline
    without = pressed.perplexity(pressed.press("plain", variant("awq", scaling="none")))
    assert found["awq"] < 1.02 * without


def test_what_was_found_is_in_the_report(pressed: Pressed) -> None:
    pressed.press("seen", variant("awq"))
    found = pressed.pressed.structure
    assert found["scaled"]
    assert all(one["layers"] in (1, 2) for kind in found.values() for one in kind)
    if "moe" in pressed.folder.name or "deepseek" in pressed.folder.name:
        assert any("routes tokens to experts" in one["reason"] for one in found["left"])
    assert pressed.pressed.kept["model.embed_tokens"] == 1
    config = json.loads((pressed.folder / "seen/config.json").read_text())
    left = [one["name"].partition("*")[2] for one in found["left"]]
    ignored = config["quantization_config"]["ignore"]
    assert all(any(name.endswith(end) for name in ignored) for end in left)
    if pressed.folder.name.startswith("qwen3_moe"):  # no nn.Linear, but a linear layer in vLLM
        assert {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} <= {*ignored}


def test_scaling_that_changes_the_layer_is_caught(pressed: Pressed, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of norms that multiply by 1 + w, scaled as if they multiplied by w."""
    real: Callable[..., None] = Layer.scale_input

    def wrong(layer: Layer, pair: Any, scale: torch.Tensor, dtype: torch.dtype) -> None:
        real(layer, pair, scale, dtype)
        if pair.offset is not None:
            layer.tensors[f"{pair.source}.weight"] += 1 - 1 / scale if pair.offset else 0.05

    monkeypatch.setattr(Layer, "scale_input", wrong)
    with pytest.raises(TaskError, match=r"scaling model\.layers\.0\.\* changed what it makes"):
        pressed.press("wrong", variant("awq"))


def test_weights_that_change_places_are_caught(pressed: Pressed, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of two experts, between solving and writing."""
    real = layerwise.Parts.write_layer

    def swapped(parts: Any, share: Any, layer: Layer, solved: dict[str, QuantizedWeight], precisions: Any) -> None:
        names: dict[Any, list[str]] = {}
        for name, one in solved.items():
            names.setdefault(one.integers.shape, []).append(name)
        alike = max(names.values(), key=len)
        if len(alike) < 2:
            pytest.skip("no two linear layers of a decoder layer have the same shape")
        first, second = alike[:2]
        real(parts, share, layer, solved | {first: solved[second], second: solved[first]}, precisions)

    monkeypatch.setattr(layerwise.Parts, "write_layer", swapped)
    with pytest.raises(TaskError, match="is another's"):
        pressed.press("swapped", variant("gptq"))


def test_shared_values_are_scaled_only_if_asked(pressed: Pressed) -> None:
    pressed.press("default", variant("awq"))
    found = pressed.pressed.structure
    asked = [one for one in found["rejected"] if one["reason"].startswith("only with grouped_values")]
    before = pressed.perplexity(pressed.folder / "default")
    after = pressed.perplexity(pressed.press("grouped", variant("awq", grouped_values=True)))
    assert bool(asked) == (after != before)
    assert after < pressed.perplexity(pressed.folder / "source") * BOUND["awq"]


def test_experts_with_few_tokens_take_statistics_from_the_others(pressed: Pressed, tmp_path: Path) -> None:
    parts = pressed.folder / "source", pressed.folder / "calibration"
    collect(*parts, tmp_path / "own", importance=False, least=1)
    report = collect(*parts, tmp_path / "few", importance=False, least=10**6)
    own, few = (load_statistics(tmp_path / name, 1, "cpu") for name in ("own", "few"))
    experts = {name for name in own if ".experts." in name}
    assert bool(report.few_tokens) == bool(experts)
    inputs = {id(one): one.gram for name, one in own.items() if name in experts and "down" not in name}
    for name in own:
        if name not in experts:
            assert torch.equal(few[name].gram, own[name].gram)
        elif "down" in name:
            assert torch.equal(few[name].gram, own[name].gram.diagonal().diag())
        else:
            assert torch.allclose(few[name].gram, torch.stack([*inputs.values()]).sum(0), rtol=1e-4, atol=1e-4)
