"""The target onnx: the graph computes with the quantized weights, and the runtime implements the protocol."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.errors import TaskError
from tasks.export import export
from tasks.exporters.onnx.exporter import OnnxExporter
from tasks.exporters.onnx.graph import FLOATS, GRAPH, INTEGERS, WEIGHTS, export_onnx
from tasks.formats.nbits import Blocks, block_size, pack_bits, pack_blocks, unpack_blocks
from tasks.formats.stored import StoredModel
from tasks.grid import Grid, Precision, QuantizedWeight
from tasks.output import write_manifest
from tasks.runtimes import Question, load_runtime
from tasks.runtimes.onnx import OnnxRuntime
from tasks.scoring.completions import complete
from tasks.scoring.lm_eval_adapter import RuntimeLM
from tasks.settings import check_settings, load_settings
from tasks.tensor_files import EMBEDDING, OUTPUT
from tests.mixed import rounded_model, untied
from tests.tiny import LLAMA3, tiny_model

SETTINGS = load_settings(Path("params.yaml"))
IDS = torch.tensor([[5, 9, 30, 31, 32, 40, 41, 100, 7, 8, 300, 12], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
WORDS = Precision(Grid(4, 32, False, torch.float16))
BYTES = Precision(Grid(8, None, True, torch.float32), symmetric_activations=False)
# layers with different bits and groups, as in mixed precision
MIXED: dict[str, Precision | None] = {
    "0.self_attn.q_proj": Precision(Grid(4, 128, True, torch.float16)),
    "0.self_attn.v_proj": Precision(Grid(8, 32, False, torch.float16)),
    "1.self_attn.q_proj": Precision(Grid(8, 128, True, torch.float16)),
    "1.self_attn.k_proj": Precision(Grid(8, 16, False, torch.float16)),
    "1.self_attn.v_proj": Precision(Grid(8, 64, False, torch.float16)),
    "0.mlp.gate_proj": Precision(Grid(8, 128, False, torch.float16)),
    "0.mlp.down_proj": Precision(Grid(4, 256, False, torch.float16)),
    "1.mlp.up_proj": BYTES,
    "1.mlp.down_proj": None,
    "": WORDS,
}


@pytest.fixture(scope="module")
def words(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rounded_model(llama, tmp_path_factory.mktemp("words") / "model", {"": WORDS})


def exported(model: Path, directory: Path, **options: Any) -> OnnxRuntime:
    directory.mkdir(exist_ok=True)
    export_onnx(model, directory, **options)
    for file in model.glob("*token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return OnnxRuntime(directory, "float32")


def logprobs(model: Path) -> Tensor:
    """Log-probabilities by transformers, of the dequantized model."""
    stored = StoredModel(model)
    config = AutoConfig.from_pretrained(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dense: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = {name: stored.tensor(name).float() for name in stored.dense}
    tensors |= {f"{name}.weight": stored.linear(name).weight.weight() for name in stored.quantized}
    if config.tie_word_embeddings and OUTPUT in stored.quantized:
        tensors[f"{EMBEDDING}.weight"] = tensors[f"{OUTPUT}.weight"]
    missing, unexpected = dense.load_state_dict(tensors, strict=False)
    assert set(missing) <= {f"{OUTPUT}.weight"}
    assert not unexpected
    dense.tie_weights()
    with torch.inference_mode():
        found: Tensor = dense.eval()(IDS).logits.log_softmax(-1)
    return found


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors of log-probabilities, nats."""
    return (one - other).abs().max().item()


def divergence(one: Tensor, other: Tensor) -> float:
    """Mean divergence over the tokens, nats."""
    return (other.exp() * (other - one)).sum(-1).mean().item()


EXACT = 2e-4  # nats, if only the order of float32 sums differs


@pytest.mark.parametrize(
    ("precisions", "form"),
    [
        pytest.param({"": BYTES}, "compressed-tensors", id="W8A8"),
        pytest.param({"": WORDS}, "compressed-tensors", id="W4A16_ASYM"),
        pytest.param(
            {"": Precision(Grid(4, 128, True, torch.float16))},
            "compressed-tensors",
            id="W4A16, groups of two blocks",
        ),
        pytest.param({"": WORDS}, "awq", id="awq"),
        pytest.param({"": Precision(Grid(4, 32, False, torch.float16, least_zero=1))}, "gptq", id="gptq"),
        pytest.param(MIXED, "compressed-tensors", id="mixed"),
    ],
)
def test_graph_contains_the_quantized_weights(
    tmp_path: Path, precisions: Mapping[str, Precision | None], form: str
) -> None:
    model = tiny_model(tmp_path / "base", hidden=128)
    pressed = rounded_model(model, tmp_path / "model", precisions, form)
    expected = logprobs(pressed)
    floats = exported(pressed, tmp_path / "floats", accuracy_level=FLOATS).logprobs(IDS)
    assert distance(floats, expected) < EXACT
    # the shipped kernels also round the activations
    integers = exported(pressed, tmp_path / "integers").logprobs(IDS)
    assert distance(integers, expected) > EXACT
    assert divergence(integers, expected) < 0.01


def test_llama3s_positions_are_those_of_transformers(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    plain = logprobs(model)
    rope = LLAMA3 | {"original_max_position_embeddings": 16}
    (model / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    expected = logprobs(model)
    assert distance(expected, plain) > 100 * EXACT
    assert distance(exported(model, tmp_path / "onnx").logprobs(IDS), expected) < EXACT


@pytest.mark.parametrize(
    ("family", "turn"), [("llama", "linear"), ("llama", "yarn"), ("qwen2", "llama3"), ("qwen2", "dynamic")]
)
def test_positions_that_the_graph_would_compute_otherwise_are_refused(family: str, turn: str, tmp_path: Path) -> None:
    config = {"model_type": family, "rope_theta": 10000.0, "rope_scaling": {"type": turn, "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TaskError, match=rf"has rope_type '{turn}'.*supported for {family}: default"):
        OnnxExporter().check(SETTINGS.model_copy(update={"targets": ["onnx"]}), tmp_path)


def test_layers_keep_their_bits_and_share_a_product_only_with_equal_bits(tmp_path: Path) -> None:
    pressed = rounded_model(tiny_model(tmp_path / "base", hidden=128), tmp_path / "model", MIXED)
    export_onnx(pressed, tmp_path)
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
def test_baseline_is_unchanged(family: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", family=family)
    assert distance(exported(model, tmp_path / "onnx").logprobs(IDS), logprobs(model)) < EXACT


OUTER = {
    "W8A16@64": Precision(Grid(8, 64, True, torch.bfloat16)),
    "W4A16_ASYM@32": Precision(Grid(4, 32, False, torch.float16)),
}


@pytest.mark.parametrize("label", OUTER)
@pytest.mark.parametrize("tied", [True, False])
def test_output_layer_and_embedding_are_the_quantized_ones(tied: bool, label: str, llama: Path, tmp_path: Path) -> None:
    """If tied, they share the integers."""
    base = llama if tied else untied(llama, tmp_path / "base")
    precisions = {"": WORDS, OUTPUT: OUTER[label]} | ({} if tied else {EMBEDDING: OUTER["W8A16@64"]})
    pressed = rounded_model(base, tmp_path / "pressed", precisions)
    found = exported(pressed, tmp_path / "onnx", accuracy_level=FLOATS).logprobs(IDS)
    assert distance(found, logprobs(pressed)) < EXACT
    plain = rounded_model(base, tmp_path / "plain", {"": WORDS})
    assert distance(found, logprobs(plain)) > 10 * EXACT
    names = [i.name for i in onnx.load(tmp_path / "onnx" / GRAPH, load_external_data=False).graph.initializer]
    assert not any("embed_tokens.weight" in name for name in names)
    assert sum(name.endswith("GatherBlockQuantized.qweight") for name in names) == (not tied)


@pytest.mark.parametrize("outer", ["output", "embedding"])
def test_one_of_an_untied_pair_may_be_unquantized(outer: str, llama: Path, tmp_path: Path) -> None:
    base = untied(llama, tmp_path / "base")
    name = OUTPUT if outer == "output" else EMBEDDING
    pressed = rounded_model(base, tmp_path / "pressed", {"": WORDS, name: OUTER["W8A16@64"]})
    found = exported(pressed, tmp_path / "onnx", accuracy_level=FLOATS).logprobs(IDS)
    assert distance(found, logprobs(pressed)) < EXACT


@pytest.mark.parametrize(
    ("precisions", "form"),
    [
        ({"": WORDS, OUTPUT: OUTER["W8A16@64"]}, "compressed-tensors"),
        ({"": WORDS, OUTPUT: OUTER["W4A16_ASYM@32"]}, "compressed-tensors"),
        (MIXED | {OUTPUT: OUTER["W8A16@64"]}, "compressed-tensors"),
        ({"": WORDS}, "awq"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_export_only_transcodes(
    tied: bool, precisions: Mapping[str, Precision | None], form: str, tmp_path: Path
) -> None:
    """The file's dequantized weights equal the stored ones exactly."""
    base = tiny_model(tmp_path / "base", hidden=128)
    if not tied:
        base = untied(base, tmp_path / "untied")
        if OUTPUT in precisions:
            precisions = {**precisions, EMBEDDING: OUTER["W4A16_ASYM@32"]}
    pressed = rounded_model(base, tmp_path / "pressed", precisions, form)
    export_onnx(pressed, tmp_path)
    stored, found = StoredModel(pressed), products(tmp_path / GRAPH)
    seen = set()
    for names, weight in found.items():
        parts = weight.split([len(stored.weights(name)) for name in names])
        for name, part in zip(names, parts, strict=True):
            assert torch.equal(part, stored.weights(name)), name
            seen.add(name)
    assert seen == set(stored.quantized)


def products(graph: Path) -> dict[tuple[str, ...], Tensor]:
    """The file's dequantized weights, by the names of the layers stacked in each."""
    model = onnx.load(graph).graph
    parts = {i.name: torch.tensor(onnx.numpy_helper.to_array(i)) for i in model.initializer}
    found = {}
    for node in model.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        options = {a.name: a.i for a in node.attribute}
        stem = next(name for name in node.input if name.endswith(".scales")).removesuffix(".scales")
        packed, scales, zeros = (parts[f"{stem}.{end}"] for end in ("qweight", "scales", "qzeros"))
        solved = unpack_blocks(Blocks(packed, scales, zeros), options["bits"])
        assert solved.group_size == options["block_size"]
        found[layers(stem)] = solved.weight()
    return found


def layers(stem: str) -> tuple[str, ...]:
    """The layers in the product node of this name, such as model.layers.0.attn.qkv_proj.MatMulNBits."""
    if not stem.startswith("model.layers."):
        return (stem.rpartition(".")[0],)
    name = stem.removesuffix(".MatMulNBits").replace(".attn.", ".self_attn.")
    if name.endswith("qkv_proj"):
        return tuple(name.replace("qkv_proj", f"{letter}_proj") for letter in "qkv")
    return (name,)


@pytest.mark.parametrize("label", OUTER)
def test_the_same_model_gives_the_same_bytes(label: str, llama: Path, tmp_path: Path) -> None:
    pressed = rounded_model(llama, tmp_path / "pressed", {"": WORDS, OUTPUT: OUTER[label]})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        export_onnx(pressed, tmp_path / name)
    for file in (GRAPH, WEIGHTS, "genai_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_unsupported_group_sizes_are_refused_before_work_starts_and_in_export(llama: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8")) | {"targets": ["onnx"]}
    OnnxExporter().check(check_settings(values), llama)
    for key, value in (("group_size", 24), ("output_layer", "W8A16@24"), ("embedding", "W8A16@24")):
        variants = {**values["variants"], "v": {**values["variants"]["gptq-int4"], key: value}}
        with pytest.raises(
            TaskError, match=rf"variants\.v\.{key} has groups of 24, .* fit the target onnx: 16 and its"
        ):
            OnnxExporter().check(check_settings(values | {"variants": variants}), None)
    pressed = rounded_model(llama, tmp_path / "pressed", {"": Precision(Grid(4, 8, False, torch.float16))})
    with pytest.raises(TaskError, match=r"model\.layers\.0\..* has groups of 8, .* set group_size to a multiple of 16"):
        export_onnx(pressed, tmp_path)


def test_a_family_without_a_graph_and_missing_tensors_are_refused(llama: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "gemma", family="gemma")
    with pytest.raises(TaskError, match=r"of type 'gemma'.*supported: llama, mistral"):
        OnnxExporter().export(other, tmp_path)
    with pytest.raises(TaskError, match=r"of type 'gemma'.*supported: llama, mistral"):
        OnnxExporter().check(SETTINGS, other)
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "config.json").write_bytes((llama / "config.json").read_bytes())
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors")
    with pytest.raises(TaskError, match=r"missing \['model.layers.1.mlp.up_proj.weight'\]"):
        export_onnx(lacking, tmp_path)


class TestBlocks:
    def test_the_largest_block_that_divides_a_group(self) -> None:
        assert [block_size("a", group) for group in (16, 32, 64, 96, 128, 576)] == [16, 32, 64, 32, 64, 64]
        with pytest.raises(TaskError, match="down_proj has groups of 8"):
            block_size("down_proj", 8)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_scale_of_a_longer_group_is_repeated_per_block(self, bits: int) -> None:
        random = torch.Generator().manual_seed(0)
        solved = QuantizedWeight(
            torch.randint(0, 2**bits, (4, 192), generator=random, dtype=torch.uint8),
            torch.rand(4, 3, generator=random).half(),
            torch.randint(0, 2**bits, (4, 3), generator=random, dtype=torch.uint8),
        )
        blocks = pack_blocks(solved, bits, 16)
        back = unpack_blocks(blocks, bits)
        assert torch.equal(back.integers, solved.integers)
        assert torch.equal(back.scales, solved.scales.float().repeat_interleave(4, 1))
        assert torch.equal(back.zeros, solved.zeros.repeat_interleave(4, 1))
        assert blocks.integers.shape == (4, 12, 16 * bits // 8)
        assert torch.equal(blocks.scales, solved.scales.float().repeat_interleave(4, 1))
        each = QuantizedWeight(solved.integers, blocks.scales, solved.zeros.repeat_interleave(4, 1))
        assert torch.equal(each.weight(), solved.weight())
        assert torch.equal(blocks.zeros, pack_bits(each.zeros, bits))

    def test_bytes_are_filled_from_the_lowest_bits_and_padded(self) -> None:
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
        export(directory / "model", "onnx", directory / "base")
        runtime = load_runtime("onnx", directory / "base", "float32")
        assert isinstance(runtime, OnnxRuntime)
        return runtime

    @pytest.mark.parametrize("batch_tokens", [1, 16, 4096])
    def test_scores_equal_one_forward_pass_per_continuation(
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

    def test_generated_text_equals_that_of_transformers(self, llama: Path, runtime: OnnxRuntime) -> None:
        other = load_runtime("transformers", llama, "float32")
        ids = torch.tensor([[5, 9, 30], [100, 8, 40]])
        assert runtime.generate_ids(ids, 6).tolist() == other.generate_ids(ids, 6).tolist()
        assert runtime.generate("Anna", 12) == other.generate("Anna", 12)

    def test_greedy_texts_equal_those_of_transformers(self, llama: Path, runtime: OnnxRuntime) -> None:
        other = load_runtime("transformers", llama, "float32")
        texts = ["Ada repairs the lamp", "Ben", "Cleo"]
        for ours, theirs in zip(complete(runtime, [1], texts), complete(other, [1], texts), strict=True):
            assert (ours.prompt_ids, ours.ids, ours.text) == (theirs.prompt_ids, theirs.ids, theirs.text)
            best, known = (list(chain.from_iterable(one.best_logprobs)) for one in (ours, theirs))
            assert best == pytest.approx(known, abs=1e-3)

    def test_sampling_keys_of_the_source_do_not_change_the_text_and_stay_in_the_bundle(
        self, llama: Path, runtime: OnnxRuntime, tmp_path: Path
    ) -> None:
        shutil.copytree(llama, tmp_path / "model")
        keys = tmp_path / "model/generation_config.json"
        keys.write_text(
            json.dumps(
                {**json.loads(keys.read_text()), "do_sample": True, "temperature": 5.0, "repetition_penalty": 5.0}
            )
        )
        write_manifest(tmp_path / "model")
        export(tmp_path / "model", "onnx", tmp_path / "out")
        assert (tmp_path / "out/generation_config.json").read_bytes() == keys.read_bytes()
        # also those keys of the search that the exporter does not take from the source today
        described = json.loads((tmp_path / "out/genai_config.json").read_text())
        described["search"] |= {
            "do_sample": True,
            "repetition_penalty": 5.0,
            "no_repeat_ngram_size": 1,
            "min_length": 20,
        }
        (tmp_path / "out/genai_config.json").write_text(json.dumps(described))
        other = load_runtime("onnx", tmp_path / "out", "float32")
        ids = torch.tensor([[5, 9, 30], [100, 8, 40]])
        assert other.generate_ids(ids, 6).tolist() == runtime.generate_ids(ids, 6).tolist()
        assert other.generate("Anna", 12) == runtime.generate("Anna", 12)

    def test_scores_and_texts_may_alternate(self, runtime: OnnxRuntime) -> None:
        written = tuple(runtime.generate_ids(torch.tensor([[5, 9, 30]]), 4)[0, 3:].tolist())
        (scores,) = runtime.score([Question((5, 9, 30), (written, (1, 1)))], 64, "test")
        assert [s.greedy for s in scores] == [True, False]
        assert runtime.generate_ids(torch.tensor([[5, 9, 30]]), 4)[0, 3:].tolist() == list(written)

    def test_lm_eval_can_make_all_its_requests(self, runtime: OnnxRuntime) -> None:
        model = RuntimeLM(runtime, 64, 128)
        text = "Anna saw the river. " * 40
        (rolled,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
        assert rolled < 0
        options = {"until": [], "max_gen_toks": 5}
        assert model.generate_until([Instance("generate_until", {}, ("Anna", options), 0)])[0]

    def test_info_describes_the_runtime(self, runtime: OnnxRuntime) -> None:
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
