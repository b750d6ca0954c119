"""One pass, layer by layer: the same activations as in the whole model, and their sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tasks.decoder import Decoder
from tasks.errors import TaskError
from tasks.fit import ARCHITECTURES
from tasks.statistics import collect, load_statistics
from tasks.weights import join
from tests.tiny import tiny_model

TOKENS = torch.randint(6, 200, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp(request.param) / "model", family=request.param)


@pytest.fixture(scope="module")
def whole(model: Path) -> tuple[dict[str, Tensor], Tensor]:
    """What each linear layer of the whole model reads, by name, and the output of its last decoder layer."""
    found: dict[str, list[Tensor]] = {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, module in loaded.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append(args[0]))
    last: list[Tensor] = []
    loaded.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.inference_mode():
        for row in TOKENS.split(1):
            loaded(row)
    return {name: torch.cat(parts).flatten(0, -2) for name, parts in found.items()}, torch.cat(last)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_layer_at_a_time_is_the_whole_model(model: Path, whole: tuple[dict[str, Tensor], Tensor], rows: int) -> None:
    decoder = Decoder(model, torch.float32, "cpu")
    hidden = decoder.embed(list(TOKENS.split(rows)))  # the last batch is smaller
    for index in range(len(decoder)):
        with decoder.layer(index) as layer:
            hidden = [decoder.run(index, layer, batch) for batch in hidden]
        assert all(parameter.is_meta for parameter in layer.parameters())
    assert torch.allclose(torch.cat(hidden), whole[1], atol=1e-4)


def test_the_sums_are_those_of_the_whole_model(
    model: Path, whole: tuple[dict[str, Tensor], Tensor], tmp_path: Path
) -> None:
    save_file({"input_ids": TOKENS}, tmp_path / "tokens.safetensors")
    report = collect(model, tmp_path, tmp_path / "out")
    assert (report.tokens, report.layers) == (TOKENS.numel(), 2)
    assert report.bytes > 0
    for layer in range(2):
        known = load_statistics(tmp_path / "out", layer, "cpu")
        assert len(known) == 7
        assert known["self_attn.q_proj"] is known["self_attn.k_proj"] is known["self_attn.v_proj"]
        assert known["mlp.gate_proj"] is known["mlp.up_proj"]
        assert len({id(one) for one in known.values()}) == 4
        for name, one in known.items():
            x = whole[0][f"{layer}.{name}"]
            assert torch.allclose(one.gram, x.T @ x, rtol=1e-3, atol=1e-3)
            assert torch.allclose(one.largest, x.abs().amax(0), rtol=1e-3, atol=1e-5)
            assert torch.allclose(one.mean, x.abs().mean(0), rtol=1e-3, atol=1e-5)


def test_statistics_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="run the statistics stage first"):
        load_statistics(tmp_path, 0, "cpu")


@pytest.mark.parametrize(("largest", "files"), [(10**6, 1), (300, 2)])
def test_joined_parts_are_one_model(tmp_path: Path, largest: int, files: int) -> None:
    parts = []
    for number in range(3):
        parts.append(tmp_path / f"{number}.safetensors")
        save_file({f"{number}.half": torch.randn(50).bfloat16(), f"{number}.odd": torch.arange(100).byte()}, parts[-1])
    (tmp_path / "out").mkdir()
    join(parts, tmp_path / "out", largest)
    found = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(found) == files
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (files > 1)
    joined = {name: tensor for file in found for name, tensor in load_file(file).items()}
    expected = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[name], expected[name]) for name in expected)
