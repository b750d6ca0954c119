"""The layer-by-layer pass: same activations as in the whole model, and their sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tasks import statistics, tensor_files
from tasks.activations import gram, importance
from tasks.activations.importance import load_importance
from tasks.activations.store import load_statistics
from tasks.errors import TaskError
from tasks.model import structure
from tasks.model import whole as whole_model
from tasks.model.decoder import Decoder
from tasks.output import checksums, resumable_directory
from tasks.statistics import collect
from tasks.tensor_files import join
from tests.tiny import FAMILIES, tiny_model

TOKENS = torch.randint(6, 200, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp(request.param) / "model", family=request.param)


@pytest.fixture(scope="module")
def whole(model: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of each linear layer of the whole model, by name, and the output of its last decoder layer."""
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


@pytest.mark.parametrize("weighed", [False, True])
def test_output_layers_input_is_summed_as_well(
    model: Path, weighed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        x = torch.cat([loaded.model(row).last_hidden_state for row in TOKENS.split(1)]).flatten(0, -2)
    monkeypatch.setattr(statistics, "fast_dtype", lambda _: torch.float32)
    save_file({"input_ids": TOKENS}, tmp_path / "tokens.safetensors")
    collect(model, tmp_path, tmp_path / "out", importance=weighed)
    (known,) = load_statistics(tmp_path / "out", None, "cpu").values()
    # with token weights, activations between layers are bfloat16
    near = 0.01 if weighed else 1e-5
    for found, right in ((known.gram, x.T @ x), (known.largest, x.abs().amax(0)), (known.mean, x.abs().mean(0))):
        assert found.dtype == torch.float32
        assert (found - right).norm() < near * right.norm()


@pytest.mark.parametrize("rows", [1, 2])
def test_layer_by_layer_equals_the_whole_model(model: Path, whole: tuple[dict[str, Tensor], Tensor], rows: int) -> None:
    decoder = Decoder(model, torch.float32, "cpu")
    hidden = decoder.embed(list(TOKENS.split(rows)))  # the last batch is smaller
    for index in range(len(decoder)):
        with decoder.layer(index) as layer:
            hidden = [decoder.run(index, layer, batch, number) for number, batch in enumerate(hidden)]
        assert all(parameter.is_meta for parameter in layer.parameters())
    assert torch.allclose(torch.cat(hidden), whole[1], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_equal_those_of_the_whole_model(
    model: Path,
    whole: tuple[dict[str, Tensor], Tensor],
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "fast_dtype", lambda _: dtype)
    save_file({"input_ids": TOKENS}, tmp_path / "tokens.safetensors")
    report = collect(model, tmp_path, tmp_path / "out", importance=False)
    assert (report.tokens, report.layers, report.dtype) == (TOKENS.numel(), 2, str(dtype).removeprefix("torch."))
    assert report.bytes > 0
    for layer in range(2):
        known = load_statistics(tmp_path / "out", layer, "cpu")
        assert len(known) == 7
        assert known["self_attn.q_proj"] is known["self_attn.k_proj"] is known["self_attn.v_proj"]
        assert known["mlp.gate_proj"] is known["mlp.up_proj"]
        assert len({id(one) for one in known.values()}) == 4
        for name, one in known.items():
            x = whole[0][f"{layer}.{name}"]
            for found, expected in (
                (one.gram, x.T @ x),
                (one.largest, x.abs().amax(0)),
                (one.mean, x.abs().mean(0)),
            ):
                assert found.dtype == torch.float32
                if dtype == torch.float32:
                    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 if found is one.gram else 1e-5)
                else:
                    assert (found - expected).norm() < 0.05 * expected.norm()


def test_token_weights_are_fisher_information(
    model: Path, whole: tuple[dict[str, Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a backward pass of the whole model, with known drawn tokens: the first of the vocabulary."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    slopes: dict[str, list[Tensor]] = {}
    for name, module in loaded.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            name_slopes = slopes.setdefault(name, [])
            module.register_full_backward_hook(
                lambda *slope, kept=name_slopes: kept.append(slope[-1][0].square().sum(-1))
            )
    for row in TOKENS.split(1):
        logits = loaded(row).logits[0]
        nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="sum").backward()
    squares = {name: torch.cat(parts) for name, parts in slopes.items()}
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.zeros(size))
    monkeypatch.setattr(statistics, "fast_dtype", lambda _: torch.float32)
    save_file({"input_ids": TOKENS}, tmp_path / "tokens.safetensors")
    collect(model, tmp_path, tmp_path / "out", importance=True)
    for layer in range(2):
        weighed = load_importance(tmp_path / "out", layer, "cpu")
        readers = {
            "self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "self_attn.o_proj": ["self_attn.o_proj"],
            "mlp.gate_proj": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.down_proj": ["mlp.down_proj"],
        }
        assert weighed.keys() == readers.keys()
        known = load_statistics(tmp_path / "out", layer, "cpu")
        for first, names in readers.items():
            root = sum((squares[f"{layer}.{name}"] for name in names), torch.zeros(TOKENS.shape)).sqrt()
            expected = root / root.mean(-1, keepdim=True)
            # activations between layers are bfloat16
            assert (weighed[first] - expected).norm() < 0.03 * expected.norm()
            x = whole[0][f"{layer}.{first}"]
            gram = (x * weighed[first].flatten()[:, None]).T @ x
            for found, right in ((known[first].gram, gram), (known[first].mean, x.abs().mean(0))):
                assert (found - right).norm() < 0.01 * right.norm()


def test_token_weights_from_bfloat16_products_are_similar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model")
    save_file({"input_ids": TOKENS}, tmp_path / "tokens.safetensors")
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.zeros(size))
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(statistics, "fast_dtype", lambda _, dtype=dtype: dtype)
        collect(model, tmp_path, tmp_path / str(dtype), importance=True)
    exact, near = (load_importance(tmp_path / str(dtype), 0, "cpu") for dtype in (torch.float32, torch.bfloat16))
    for name, weight in exact.items():
        assert near[name].dtype == torch.float32
        assert 0 < (near[name] - weight).norm() < 0.1 * weight.norm()


class Attended(TorchDispatchMode):
    """Records the dtype of attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if "attention" in str(func):
            self.dtypes |= {value.dtype for value in args if isinstance(value, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weighed", [False, True])
def test_bfloat16_products_give_the_same_bytes_with_any_number_of_threads(
    weighed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "model", hidden=256, heads=4)
    tokens = torch.randint(6, 200, (2, 192), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens}, tmp_path / "tokens.safetensors")
    monkeypatch.setattr(statistics, "fast_dtype", lambda _: torch.bfloat16)
    found = structure.discover(Decoder(model, torch.float32, "cpu"), tokens[:1, : structure.TOKENS])
    monkeypatch.setattr(structure, "discover", lambda *_: found)  # once is enough, and 16 threads are slow here
    monkeypatch.setattr(whole_model, "check_streamed", lambda *_: None)
    threads = torch.get_num_threads()
    with Attended() as attended:
        for count in (1, 2, 16):
            torch.set_num_threads(count)
            try:
                assert collect(model, tmp_path, tmp_path / str(count), weighed).dtype == "bfloat16"
            finally:
                torch.set_num_threads(threads)
    # with AMX, which this machine may lack, the last bits of bfloat16 attention depend on the number of threads
    assert attended.dtypes == {torch.float32}
    assert checksums(tmp_path / "1") == checksums(tmp_path / "2") == checksums(tmp_path / "16")


def test_tokens_without_influence_have_equal_weights() -> None:
    assert importance._weight(torch.tensor([[0.0, 0.0], [1.0, 9.0]])).tolist() == [[1.0, 1.0], [0.5, 1.5]]


@pytest.mark.parametrize("saved", [1, 3, 4, 5, 6, 7, 8, 10, 14])
def test_interrupted_pass_resumes(tmp_path: Path, saved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward (4 files), the output layer's sums and the gradient (2), backward (3 per layer)."""
    model = tiny_model(tmp_path / "model", layers=3)
    (tmp_path / "calibration").mkdir()
    save_file({"input_ids": TOKENS}, tmp_path / "calibration/tokens.safetensors")
    collect(model, tmp_path / "calibration", tmp_path / "at-once", importance=True)
    files: list[str] = []
    real = tensor_files.save

    def save(tensors: dict[str, Tensor], path: Path, *more: Any) -> None:
        if len(files) == saved:
            files.append("interrupted")
            raise KeyboardInterrupt
        files.append(path.name)
        real(tensors, path, *more)

    for module in (importance, gram):
        monkeypatch.setattr(module, "save", save)
    with pytest.raises(KeyboardInterrupt):
        collect(model, tmp_path / "calibration", tmp_path / "out", importance=True)
    assert not (tmp_path / "out").exists()
    collect(model, tmp_path / "calibration", tmp_path / "out", importance=True)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "at-once")
    files.remove("interrupted")
    # two of a layer's three files may have to be written again
    assert len(files) <= 15 + 2
    assert not list(tmp_path.glob(".*.part"))


def test_tokens_have_equal_weights_by_default(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    save_file({"input_ids": TOKENS}, tmp_path / "tokens.safetensors")
    collect(model, tmp_path, tmp_path / "out", importance=False)
    assert load_importance(tmp_path / "out", 0, "cpu") == {}
    assert not list((tmp_path / "out").glob("importance*"))


def test_partial_output_for_another_model_is_deleted(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), resumable_directory(tmp_path / "out", "one") as work:
        (work / "begun").write_text("x")
        raise KeyboardInterrupt
    assert next(tmp_path.glob(".out.*.part/new/begun")).read_text() == "x"
    with resumable_directory(tmp_path / "out", "two") as work:
        assert not list(work.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_missing_statistics_name_the_stage(tmp_path: Path) -> None:
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


MAKE = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
                     num_key_value_heads=4, vocab_size=32000)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained("model")
print(sum(parameter.numel() for parameter in model.parameters()))
"""
COLLECT = """
import json
from dataclasses import asdict
from pathlib import Path
from tasks.statistics import collect

print(json.dumps(asdict(collect(Path("model"), Path("calibration"), Path("out"), importance=True))))
"""


@pytest.mark.slow
def test_large_model_takes_the_estimated_memory(tmp_path: Path) -> None:
    """A llama with 1.1 billion weights: 2.2 GB as stored, 4.4 GB in float32."""

    def run(program: str) -> Any:
        # separate processes, because a forked process inherits its parent's peak
        command, environment = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": os.getcwd()}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    (tmp_path / "calibration").mkdir()
    save_file({"input_ids": TOKENS.repeat(2, 12)[:4]}, tmp_path / "calibration/tokens.safetensors")
    parameters = run(MAKE)
    report = run(COLLECT)
    assert parameters > 10**9
    assert report["peak_memory_bytes"] == pytest.approx(report["estimate_bytes"], rel=0.25)
    assert report["peak_memory_bytes"] < 2 * parameters
