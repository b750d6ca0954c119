"""The target onnx: the graph computes with the weights that were solved, and the runtime keeps the protocol."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from tasks.formats.awq_gemm import gemm_config, pack_gemm
from tasks.formats.compressed import bytes_config, pack_bytes, pack_words, words_config
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.activations.store import load_statistics
from tasks.errors import TaskError
from tasks.export import export
from tasks.exporters.onnx import FLOATS, GRAPH, INTEGERS, WEIGHTS, export_onnx
from tasks.formats.nbits import block_size, pack_bits, pack_blocks
from tasks.formats.stored import StoredModel
from tasks.grid import Grid, QuantizedWeight
from tasks.output import write_manifest
from tasks.runtimes import Question, load_runtime
from tasks.runtimes.onnx import OnnxRuntime
from tasks.scoring.lm_eval_adapter import RuntimeLM
from tasks.settings import OnnxSettings
from tasks.solvers import output_error
from tasks.statistics import collect
from tests.tiny import NO_STATISTICS, tiny_model

IDS = torch.tensor([[5, 9, 30, 31, 32, 40, 41, 100, 7, 8, 300, 12], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
WORDS = Grid(4, 32, False, torch.float16)
BYTES = Grid(8, None, True, torch.float32)
WORDS_CONFIG, BYTES_CONFIG = words_config({"all": WORDS}, True, ["lm_head"]), bytes_config(False, ["lm_head"])
GEMM_CONFIG = gemm_config(WORDS)
# a layer each, with bits and groups of its own, as a search for the best of them would leave it
MIXED: dict[str, Grid | None] = {
    "0.self_attn.q_proj": Grid(4, 128, True, torch.float16),
    "0.self_attn.v_proj": Grid(8, 32, False, torch.float16),
    "1.self_attn.q_proj": Grid(8, 128, True, torch.float16),
    "1.self_attn.k_proj": Grid(8, 16, False, torch.float16),
    "1.self_attn.v_proj": Grid(8, 64, False, torch.float16),
    "0.mlp.gate_proj": Grid(8, 128, False, torch.float16),
    "0.mlp.down_proj": Grid(4, 256, False, torch.float16),
    "1.mlp.up_proj": BYTES,
    "1.mlp.down_proj": None,
    "": WORDS,
}
MIXED_CONFIG = WORDS_CONFIG | {
    "config_groups": {
        f"group_{i}": words_config({"all": grid}, True, [])["config_groups"]["group_0"] | {"targets": [f"re:.*{end}"]}
        for i, (end, grid) in enumerate(MIXED.items())
        if grid is not None and grid != BYTES
    }
}


def press(model: Path, directory: Path, grids: Mapping[str, Grid | None], config: dict[str, Any]) -> Path:
    """The model with its linear layers rounded: each to the grid of the first key that its name ends with."""
    directory.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        grid = next((g for end, g in grids.items() if name.endswith(f"{end}.weight") and "layers." in name), None)
        if grid is None or tensor.dim() == 1:
            tensors[name] = tensor
            continue
        solved = round_to_grid(tensor.float(), *fit_grid(tensor.float(), grid), grid)
        stem = name.removesuffix(".weight")
        if config is GEMM_CONFIG:
            packed = pack_gemm(solved)
        else:
            packed = pack_bytes(solved) if grid == BYTES else pack_words(solved, grid)
        tensors |= {f"{stem}.{end}": part.contiguous() for end, part in packed.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    described = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(described | {"quantization_config": config}))
    for file in model.glob("*token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture(scope="module")
def words(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return press(llama, tmp_path_factory.mktemp("words") / "model", {"": WORDS}, WORDS_CONFIG)


@pytest.fixture(scope="module")
def statistics(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    calibration = tmp_path_factory.mktemp("calibration")
    tokens = torch.randint(6, 200, (8, 64), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens}, calibration / "tokens.safetensors")
    collect(llama, calibration, calibration / "statistics", importance=False)
    return calibration / "statistics"


def exported(
    model: Path, directory: Path, output_layer: int, statistics: Path = NO_STATISTICS, **options: Any
) -> OnnxRuntime:
    directory.mkdir(exist_ok=True)
    export_onnx(model, directory, output_layer, statistics, **options)
    for file in model.glob("*token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return OnnxRuntime(directory, "float32")


def logprobs(model: Path, changed: Mapping[str, Tensor] | None = None) -> Tensor:
    """By transformers, of the dense model that a stored one stands for, with some tensors in the place of its own."""
    stored = StoredModel(model)
    config = AutoConfig.from_pretrained(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dense: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = {name: stored.tensor(name).float() for name in stored.dense}
    tensors |= {f"{name}.weight": stored.linear(name).solved.weight() for name in stored.quantized}
    dense.load_state_dict(tensors | dict(changed or {}), strict=False)
    dense.tie_weights()
    with torch.inference_mode():
        found: Tensor = dense.eval()(IDS).logits.log_softmax(-1)
    return found


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors of log-probabilities, nats."""
    return (one - other).abs().max().item()


def divergence(one: Tensor, other: Tensor) -> float:
    """Mean over the tokens, nats."""
    return (other.exp() * (other - one)).sum(-1).mean().item()


EXACT = 2e-4  # nats, where only the order of float32 sums differs


@pytest.mark.parametrize(
    ("grids", "config"),
    [
        pytest.param({"": BYTES}, BYTES_CONFIG, id="int8"),
        pytest.param({"": WORDS}, WORDS_CONFIG, id="gptq"),
        pytest.param({"": Grid(4, 128, True, torch.float16)}, WORDS_CONFIG, id="gptq, symmetric, groups of two blocks"),
        pytest.param({"": WORDS}, GEMM_CONFIG, id="awq"),
        pytest.param(MIXED, MIXED_CONFIG, id="mixed"),
    ],
)
def test_the_graph_holds_the_weights_that_were_solved(
    tmp_path: Path, grids: Mapping[str, Grid | None], config: dict[str, Any]
) -> None:
    model = tiny_model(tmp_path / "base", hidden=128)
    pressed = press(model, tmp_path / "model", grids, config)
    expected = logprobs(pressed)
    floats = exported(pressed, tmp_path / "floats", 32, accuracy_level=FLOATS).logprobs(IDS)
    assert distance(floats, expected) < EXACT
    # the kernels that ship round the activations, and do no more
    integers = exported(pressed, tmp_path / "integers", 32).logprobs(IDS)
    assert distance(integers, expected) > EXACT
    assert divergence(integers, expected) < 0.01


def test_a_layer_keeps_its_own_bits_and_shares_a_product_only_with_its_like(tmp_path: Path) -> None:
    pressed = press(tiny_model(tmp_path / "base", hidden=128), tmp_path / "model", MIXED, MIXED_CONFIG)
    export_onnx(pressed, tmp_path, 32, NO_STATISTICS)
    nodes = onnx.load(tmp_path / GRAPH, load_external_data=False).graph.node
    products = {node.name: {a.name: a.i for a in node.attribute} for node in nodes if node.op_type == "MatMulNBits"}
    found = {
        name.removeprefix("/model/layers.").removesuffix("/MatMulNBits"): (each["bits"], each["block_size"])
        for name, each in products.items()
    }
    assert found == {
        "0/attn/q_proj": (4, 64),
        "0/attn/k_proj": (4, 32),
        "0/attn/v_proj": (8, 32),
        "0/attn/o_proj": (4, 32),
        "0/mlp/gate_proj": (8, 64),
        "0/mlp/up_proj": (4, 32),
        "0/mlp/down_proj": (4, 64),
        "1/attn/qkv_proj": (8, 16),
        "1/attn/o_proj": (4, 32),
        "1/mlp/gate_proj": (4, 32),
        "1/mlp/up_proj": (8, 64),
    }
    assert {each["accuracy_level"] for each in products.values()} == {INTEGERS}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_baseline_is_left_as_it_is_whatever_the_output_layer(family: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", family=family)
    assert distance(exported(model, tmp_path / "onnx", 4).logprobs(IDS), logprobs(model)) < EXACT


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def untied(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`words` with an output layer of its own."""
    model = tmp_path_factory.mktemp("untied")
    tensors = load_file(words / "model.safetensors")
    random = torch.Generator().manual_seed(1)
    tensors[OUTPUT] = torch.randn(tensors[EMBEDDING].shape, generator=random) * 0.3
    save_file(tensors, model / "model.safetensors")
    config = json.loads((words / "config.json").read_text()) | {"tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    for file in words.glob("*token*"):
        (model / file.name).write_bytes(file.read_bytes())
    return model


@pytest.mark.parametrize("kind", ["words", "untied"])
def test_output_layer_and_embedding_are_rounded_to_8_bits(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue(kind)
    tensors = load_file(model / "model.safetensors")
    rounded = {
        n: Grid(8, 64, False, torch.float32).round(tensors[n]).weight() for n in (EMBEDDING, OUTPUT) if n in tensors
    }
    found = exported(model, tmp_path / "onnx", 8, accuracy_level=FLOATS).logprobs(IDS)
    assert distance(found, logprobs(model, rounded)) < EXACT
    assert distance(found, logprobs(model)) > 10 * EXACT


@pytest.mark.parametrize("kind", ["words", "untied"])
def test_in_4_bits_the_output_layer_is_solved(
    kind: str, request: pytest.FixtureRequest, statistics: Path, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue(kind)
    tensors = load_file(model / "model.safetensors")
    found = exported(model, tmp_path / "onnx", 4, statistics, accuracy_level=FLOATS).logprobs(IDS)
    grid = Grid(4, 32, False, torch.float32)
    weight = tensors[OUTPUT if kind == "untied" else EMBEDDING].float()
    solved = output_weight(tmp_path / "onnx" / GRAPH)
    changed = (
        {OUTPUT: solved, EMBEDDING: grid.round(tensors[EMBEDDING]).weight()}
        if kind == "untied"
        else {EMBEDDING: solved}
    )
    assert distance(found, logprobs(model, changed)) < EXACT
    assert distance(found, logprobs(model)) > 10 * EXACT
    gram = load_statistics(statistics, None, "cpu")["lm_head"].gram
    error, other = (output_error(each - weight, gram).sum() for each in (solved, grid.round(weight).weight()))
    assert 0 < error < 0.7 * other


def output_weight(graph: Path) -> Tensor:
    """What the integers of the output layer's product stand for, 4 bits each."""
    parts = {i.name: torch.tensor(onnx.numpy_helper.to_array(i)) for i in onnx.load(graph).graph.initializer}
    packed, scales, zeros = (parts[f"lm_head.MatMulNBits.{end}"] for end in ("qweight", "scales", "qzeros"))
    rows, blocks = scales.shape
    integers, zeros = (torch.stack([each & 15, each >> 4], -1).view(rows, -1) for each in (packed, zeros))
    return QuantizedWeight(integers, scales, zeros[:, :blocks]).weight()


def test_a_solved_output_layer_needs_statistics(words: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no/statistics/lm_head.safetensors is not there; run the statistics stage"):
        export_onnx(words, tmp_path, 4, NO_STATISTICS)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_same_model_gives_the_same_bytes(words: Path, statistics: Path, tmp_path: Path, bits: int) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        export_onnx(words, tmp_path / name, bits, statistics)
    for file in (GRAPH, WEIGHTS, "genai_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_family_without_a_graph_and_missing_tensors_are_refused(llama: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "gemma", family="gemma")
    with pytest.raises(TaskError, match=r"of type 'gemma'.*there are: llama, mistral"):
        export_onnx(other, tmp_path, 8, NO_STATISTICS)
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "config.json").write_bytes((llama / "config.json").read_bytes())
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors")
    with pytest.raises(TaskError, match=r"missing \['model.layers.1.mlp.up_proj.weight'\]"):
        export_onnx(lacking, tmp_path, 8, NO_STATISTICS)


class TestBlocks:
    def test_the_largest_block_that_divides_a_group(self) -> None:
        assert [block_size("a", group) for group in (16, 32, 64, 96, 128, 576)] == [16, 32, 64, 32, 64, 64]
        with pytest.raises(TaskError, match="down_proj has groups of 8"):
            block_size("down_proj", 8)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_group_of_several_blocks_stands_at_each(self, bits: int) -> None:
        random = torch.Generator().manual_seed(0)
        solved = QuantizedWeight(
            torch.randint(0, 2**bits, (4, 192), generator=random, dtype=torch.uint8),
            torch.rand(4, 3, generator=random).half(),
            torch.randint(0, 2**bits, (4, 3), generator=random, dtype=torch.uint8),
        )
        blocks = pack_blocks(solved, bits, 16)
        assert blocks.integers.shape == (4, 12, 16 * bits // 8)
        assert torch.equal(blocks.scales, solved.scales.float().repeat_interleave(4, 1))
        each = QuantizedWeight(solved.integers, blocks.scales, solved.zeros.repeat_interleave(4, 1))
        assert torch.equal(each.weight(), solved.weight())
        assert torch.equal(blocks.zeros, pack_bits(each.zeros, bits))

    def test_the_first_of_a_byte_lies_lowest_and_the_last_byte_is_filled_up(self) -> None:
        values = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
        assert pack_bits(values, 4).tolist() == [[1 + 2 * 16, 3]]
        assert pack_bits(values, 8).tolist() == [[1, 2, 3]]


QUESTIONS = [
    Question((5, 9, 30), ((7,), (8, 9, 10), (11, 12))),
    Question((5, 9, 30, 31, 32, 40, 41), ((7, 8), (100,))),
    Question((5, 9, 30, 31, 32, 40, 41, 9, 9, 9, 9, 9), ((7, 8, 9), (100,), (1, 2), (3, 4, 5))),
    Question((3,), ((4, 5, 6, 7, 8),)),
    Question((3, 4), ((4,), (5,))),
]


class TestRuntime:
    @pytest.fixture(scope="class")
    def runtime(self, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntime:
        directory = tmp_path_factory.mktemp("onnx")
        shutil.copytree(llama, directory / "model")
        write_manifest(directory / "model")
        export(directory / "model", "onnx", OnnxSettings(output_layer=8), NO_STATISTICS, directory / "base")
        runtime = load_runtime("onnx", directory / "base", "float32")
        assert isinstance(runtime, OnnxRuntime)
        return runtime

    @pytest.mark.parametrize("batch_tokens", [1, 16, 4096])
    def test_it_scores_as_one_plain_pass_a_continuation_would(
        self, llama: Path, runtime: OnnxRuntime, batch_tokens: int
    ) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
        for question, scores in zip(QUESTIONS, runtime.score(QUESTIONS, batch_tokens, "test"), strict=True):
            for continuation, score in zip(question.continuations, scores, strict=True):
                ids = torch.tensor([[*question.context, *continuation]])
                with torch.inference_mode():
                    rows = model(ids).logits[0, len(question.context) - 1 : -1].log_softmax(-1)
                expected = rows.gather(1, torch.tensor(continuation)[:, None]).sum().item()
                assert score.logprob == pytest.approx(expected, abs=1e-3)
                assert score.greedy == (rows.argmax(-1).tolist() == list(continuation))

    def test_it_writes_what_transformers_writes(self, llama: Path, runtime: OnnxRuntime) -> None:
        other = load_runtime("transformers", llama, "float32")
        ids = torch.tensor([[5, 9, 30], [100, 8, 40]])
        assert runtime.generate_ids(ids, 6).tolist() == other.generate_ids(ids, 6).tolist()
        assert runtime.generate("Anna", 12) == other.generate("Anna", 12)

    def test_scores_and_texts_may_alternate(self, runtime: OnnxRuntime) -> None:
        written = tuple(runtime.generate_ids(torch.tensor([[5, 9, 30]]), 4)[0, 3:].tolist())
        (scores,) = runtime.score([Question((5, 9, 30), (written, (1, 1)))], 64, "test")
        assert [s.greedy for s in scores] == [True, False]
        assert runtime.generate_ids(torch.tensor([[5, 9, 30]]), 4)[0, 3:].tolist() == list(written)

    def test_lm_eval_asks_it_for_all_that_it_can_ask_for(self, runtime: OnnxRuntime) -> None:
        model = RuntimeLM(runtime, 64, 128)
        text = "Anna saw the river. " * 40
        (rolled,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
        assert rolled < 0
        options = {"until": [], "max_gen_toks": 5}
        assert model.generate_until([Instance("generate_until", {}, ("Anna", options), 0)])[0]

    def test_it_says_what_it_computes_with(self, runtime: OnnxRuntime) -> None:
        assert (runtime.info.name, runtime.info.device) == ("onnxruntime-genai", "cpu")
        assert runtime.info.threads == torch.get_num_threads()
        assert runtime.fast

    def test_another_precision_and_another_kind_of_directory_are_refused(
        self, llama: Path, runtime: OnnxRuntime, tmp_path: Path
    ) -> None:
        with pytest.raises(TaskError, match="computes in float32, not bfloat16"):
            load_runtime("onnx", runtime.directory, "bfloat16")
        with pytest.raises(TaskError, match="holds no ONNX model"):
            load_runtime("onnx", llama, "float32")
        with pytest.raises(TaskError, match="holds no model"):
            load_runtime("onnx", tmp_path, "float32")
