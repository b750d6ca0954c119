"""GGUF files contain the quantized weights, read back by the format's reader and by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tasks.errors import TaskError
from tasks.exporters.gguf import GgufExporter
from tasks.formats.gguf.blocks import block_type, pack_blocks, unpack_blocks
from tasks.formats.gguf.file import _llama3_factors, check_family, write_gguf
from tasks.formats.gguf.vocabulary import add_vocabulary, rule_for_words
from tasks.formats.stored import StoredModel
from tasks.grid import Grid, Precision, QuantizedWeight
from tasks.reporting.summary import _flattered
from tasks.runtimes.transformers import TransformersRuntime
from tasks.settings import check_settings
from tasks.tensor_files import EMBEDDING, OUTPUT
from tasks.text import pretokenizer_rules
from tests.mixed import GRIDS, mixed_model, rounded_model, untied

ROWS, WIDTH = 6, 128


def solved(bits: int, group: int, middle: bool) -> QuantizedWeight:
    numbers = torch.Generator().manual_seed(bits)
    groups = WIDTH // group
    return QuantizedWeight(
        torch.randint(2**bits, (ROWS, WIDTH), generator=numbers, dtype=torch.uint8),
        (torch.rand(ROWS, groups, generator=numbers) / 50 + 1e-3).half(),
        torch.full((ROWS, groups), 2 ** (bits - 1), dtype=torch.uint8)
        if middle
        else torch.randint(2**bits, (ROWS, groups), generator=numbers, dtype=torch.uint8),
    )


def read_back(one: QuantizedWeight, kind: Type) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(pack_blocks(one, kind), kind))


@pytest.mark.parametrize("group", [32, 64, WIDTH])
@pytest.mark.parametrize(("bits", "kind"), [(8, Type.Q8_0), (4, Type.Q4_0)])
def test_a_symmetric_weight_is_exact(bits: int, kind: Type, group: int) -> None:
    one = solved(bits, group, middle=True)
    assert block_type("a", one, bits) == kind
    assert torch.equal(read_back(one, kind), one.weight())


@pytest.mark.parametrize("group", [32, 64, WIDTH])
@pytest.mark.parametrize(
    ("bits", "middle", "kind"), [(8, True, Type.Q8_0), (4, True, Type.Q4_0), (4, False, Type.Q4_1)]
)
def test_blocks_round_trip_bit_for_bit(bits: int, middle: bool, kind: Type, group: int) -> None:
    one = solved(bits, group, middle)
    found = unpack_blocks(pack_blocks(one, kind), kind, WIDTH)
    assert found.group_size == 32
    assert torch.equal(found.integers, one.integers)
    assert torch.equal(found.scales, one.scales.repeat_interleave(group // 32, 1))
    assert torch.equal(found.zeros, one.zeros.repeat_interleave(group // 32, 1))


@pytest.mark.parametrize("group", [32, 64, WIDTH])
def test_an_asymmetric_weight_is_exact_but_for_the_rounding_of_its_minimum(group: int) -> None:
    one = solved(4, group, middle=False)
    assert block_type("a", one, 4) == Type.Q4_1
    minimum = -(one.zeros.float() * one.scales.float()).repeat_interleave(group, 1)
    difference = read_back(one, Type.Q4_1) - one.weight()
    assert torch.equal(
        read_back(one, Type.Q4_1),
        one.integers.float() * one.scales.float().repeat_interleave(group, 1) + minimum.half().float(),
    )
    assert (difference.abs() <= minimum.abs() * 2**-11 + 1e-9).all()


def test_8_bits_with_zero_points_are_refused() -> None:
    """They would have to be rounded again, and an exporter never rounds."""
    with pytest.raises(
        TaskError, match=r"down_proj has 8-bit weights with zero points, .* symmetric scheme, such as W8"
    ):
        block_type("down_proj", solved(8, 32, middle=False), 8)


@pytest.mark.parametrize(
    ("shape", "groups", "bits", "message"),
    [
        ((4, 64), 4, 4, "groups of 16 in a width of 64"),
        ((4, 48), 1, 8, "groups of 48 in a width of 48"),
        ((4, 64), 2, 3, "3-bit weights"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(shape: tuple[int, int], groups: int, bits: int, message: str) -> None:
    one = QuantizedWeight(torch.zeros(shape, dtype=torch.uint8), torch.ones(4, groups), torch.zeros(4, groups).byte())
    with pytest.raises(TaskError, match=f"model.layers.0.mlp.up_proj has {message}"):
        block_type("model.layers.0.mlp.up_proj", one, bits)


def test_a_scale_beyond_float16_is_refused() -> None:
    one = QuantizedWeight(torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[1e6]]), torch.full((1, 1), 8).byte())
    with pytest.raises(TaskError, match="1e\\+06, too large"):
        pack_blocks(one, Type.Q4_0)


@pytest.fixture(scope="module")
def mixed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_model(llama, tmp_path_factory.mktemp("mixed") / "model")


@pytest.fixture(scope="module")
def written(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written")
    write_gguf(mixed, directory)
    for file in mixed.glob("token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_each_layer_gets_the_type_of_its_precision(written: Path) -> None:
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(written / "model.gguf").tensors}
    assert found["token_embd.weight"] == "BF16"
    assert "output.weight" not in found  # tied to the embedding
    layer = {
        name.removeprefix("blk.1.").removesuffix(".weight"): kind for name, kind in found.items() if "blk.1." in name
    }
    assert layer == {
        "attn_norm": "F32",
        "ffn_norm": "F32",
        "attn_q": "Q4_1",
        "attn_k": "Q4_1",
        "attn_v": "Q8_0",
        "attn_output": "Q8_0",
        "ffn_gate": "BF16",
        "ffn_up": "Q4_0",
        "ffn_down": "Q4_1",
    }


def test_transformers_reads_the_solved_weights_back(mixed: Path, written: Path) -> None:
    stored = StoredModel(mixed)
    model = TransformersRuntime(written, "float32").model
    found = dict(model.named_parameters())
    for name in stored.quantized:
        weight = stored.linear(name).weight.weight()
        # the only loss: minima in float16 (the scales, bfloat16, are exact in it)
        allowed = 0 if GRIDS[name.rpartition(".")[2]].symmetric else weight.abs().max() * 2**-11
        assert (found[f"{name}.weight"] - weight).abs().max() <= allowed, name
    for name in stored.dense:
        assert torch.equal(found[name], stored.tensor(name).float()), name


OUTER = {
    "W8A16": Precision(Grid(8, 64, True, torch.float16)),
    "W4A16": Precision(Grid(4, 32, True, torch.float16)),
    "W4A16_ASYM": Precision(Grid(4, 32, False, torch.float16)),
}
TYPES = {"W8A16": "Q8_0", "W4A16": "Q4_0", "W4A16_ASYM": "Q4_1"}


@pytest.mark.parametrize("label", OUTER)
@pytest.mark.parametrize("tied", [True, False])
def test_output_layer_and_embedding_are_exact(tied: bool, label: str, llama: Path, tmp_path: Path) -> None:
    base = llama if tied else untied(llama, tmp_path / "base")
    names = {OUTPUT: "output.weight", EMBEDDING: "token_embd.weight"}
    if tied:
        names = {OUTPUT: "token_embd.weight"}
    pressed = rounded_model(
        base, tmp_path / "pressed", {"": Precision(GRIDS["q_proj"])} | dict.fromkeys(names, OUTER[label])
    )
    write_gguf(pressed, tmp_path)
    stored = StoredModel(pressed)
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert ("output.weight" in found) != tied
    for name, own in names.items():
        solved, tensor = stored.linear(name).weight, found[own]
        assert tensor.tensor_type.name == TYPES[label]
        read = unpack_blocks(np.array(tensor.data).reshape(len(solved.integers), -1), tensor.tensor_type, 64)
        repeat = solved.group_size // 32
        assert torch.equal(read.integers, solved.integers)
        assert torch.equal(read.scales, solved.scales.half().repeat_interleave(repeat, 1))
        assert torch.equal(read.zeros, solved.zeros.repeat_interleave(repeat, 1))


def test_unquantized_tensors_are_unchanged(mixed: Path, llama: Path, tmp_path: Path) -> None:
    for model in (mixed, llama):
        write_gguf(model, tmp_path)
        (first,) = (t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "token_embd.weight")
        assert first.tensor_type == Type.BF16
        table = torch.from_numpy(np.array(first.data)).view(torch.bfloat16)
        assert torch.equal(table, StoredModel(llama).tensor("model.embed_tokens.weight"))


def test_the_tokenizer_and_configuration_are_there(written: Path, llama: Path) -> None:
    fields = gguf.GGUFReader(written / "model.gguf").fields
    tokenizer: Any = AutoTokenizer.from_pretrained(llama)

    def field(name: str) -> Any:
        return fields[name].contents()

    tokens = field("tokenizer.ggml.tokens")
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert field("tokenizer.ggml.pre") == "gpt-2"
    assert field("tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert field("tokenizer.ggml.token_type")[0] == gguf.TokenType.CONTROL
    assert field("tokenizer.chat_template") == tokenizer.chat_template
    config = json.loads((written / "config.json").read_text())
    assert "quantization_config" not in config
    assert field("llama.context_length") == config["max_position_embeddings"]
    assert field("llama.attention.head_count_kv") == config["num_key_value_heads"]


def bpe(**options: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(**{key: value for key, value in options.items() if key == "byte_fallback"}))
    tokenizer.decoder = decoders.ByteLevel()
    if "steps" in options:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(options["steps"])
    if "normalizer" in options:
        tokenizer.normalizer = options["normalizer"]
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    return described


def split(rule: str) -> list[Any]:
    from tokenizers import Regex

    return [
        pre_tokenizers.Split(Regex(rule), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("described", "name"),
    [
        (bpe(steps=[GPT2]), "gpt-2"),
        (bpe(steps=[pre_tokenizers.Digits(individual_digits=True), GPT2]), "smollm"),
        (bpe(steps=split(pretokenizer_rules.LLAMA3)), "llama-bpe"),
        (bpe(steps=split(pretokenizer_rules.QWEN2), normalizer=normalizers.NFC()), "qwen2"),
        (bpe(byte_fallback=True, normalizer=normalizers.Prepend("\u2581")), None),
    ],
)
def test_pre_tokenization_rules_have_names(described: dict[str, Any], name: str | None) -> None:
    assert rule_for_words(described, Path("m")) == name


@pytest.mark.parametrize(
    "described",
    [
        bpe(steps=[pre_tokenizers.ByteLevel(add_prefix_space=True)]),
        bpe(steps=split(r"\d+")),
        bpe(steps=[pre_tokenizers.Whitespace()]),
        {"model": {"type": "WordPiece"}, "pre_tokenizer": None, "normalizer": None},
    ],
)
def test_another_tokenizer_is_refused(described: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match=r"gpt-2, smollm, llama-bpe, qwen2 and SentencePiece"):
        rule_for_words(described, Path("m"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "'gemma2'; the target gguf supports llama, mistral, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
    ],
)
def test_another_family_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        check_family({"model_type": "llama", **changes}, "m")


def test_the_frequencies_of_llama_3_are_those_of_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=2048, num_attention_heads=32, head_dim=64, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / _llama3_factors(config.to_dict()), theirs, rtol=1e-5, atol=0)


def test_unsupported_models_are_refused_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    values["targets"] = ["gguf"]
    values["variants"]["gptq-int4"]["group_size"] = 16
    settings = check_settings(values)
    monkeypatch.setattr("tasks.exporters.gguf.is_made", lambda name: False)
    with pytest.raises(TaskError, match="compile it with: make gguf"):
        GgufExporter().check(settings, None)
    monkeypatch.setattr("tasks.exporters.gguf.is_made", lambda name: True)
    with pytest.raises(TaskError, match=r"variants.gptq-int4.group_size has groups of 16.*32 and its multiples"):
        GgufExporter().check(settings, None)
    for key in ("output_layer", "embedding"):
        values["variants"]["gptq-int4"] |= {"group_size": 64, key: "W8A16@16"}
        with pytest.raises(TaskError, match=rf"variants.gptq-int4.{key} has groups of 16.*32 and its multiples"):
            GgufExporter().check(check_settings(values), None)
        del values["variants"]["gptq-int4"][key]
    GgufExporter().check(check_settings(values), None)


def test_a_report_says_where_llama_cpps_quantizer_is_flattered() -> None:
    rows: dict[str, dict[str, Any]] = {
        "base": {"scheme": "none", "bits": None},
        "q4": {"scheme": "Q4_K_M", "bits": 4},
        "gptq": {"scheme": "W4A16_ASYM", "bits": 4},
    }
    source = {"dequantized_from": "Q4_1", "grid": {"bits": 4, "group_size": 32, "symmetric": False}}
    (note,) = _flattered(source, rows)
    assert note.startswith("q4: ")
    assert _flattered({"grid": None}, rows) == []
    assert _flattered(source, {"gptq": rows["gptq"]}) == []


def test_llama_cpps_quantizer_is_for_its_own_target() -> None:
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    values["variants"]["q4"] = {"scheme": "Q4_K_M", "imatrix": True}
    with pytest.raises(TaskError, match="only the target gguf runs, but targets has transformers"):
        check_settings(values)
    values["targets"] = ["gguf"]
    found = check_settings(values).variant("q4")
    assert (found.backend, found.format, found.bits) == ("llama.cpp", "gguf", 4)


@pytest.mark.parametrize(
    ("ends", "keys", "left"),
    [
        (1, {}, None),
        ([1, 3], {"eom": 3}, None),
        ([5, 1, 3], {"eom": 5, "eot": 3}, None),
        ([1, 3, 4, 5], {"eom": 3, "eot": 4}, "<|assistant|>"),
        ([1, 6, 9999], {}, None),  # one that llama.cpp knows by its text, and one outside the vocabulary
    ],
)
def test_end_tokens_beside_eos_are_named(
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ends: int | list[int],
    keys: dict[str, int],
    left: str | None,
) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tokens = model / "tokenizer.json"
    described = json.loads(tokens.read_text())
    (ordinary,) = (token for token, number in described["model"]["vocab"].items() if number == 6)
    described["model"]["vocab"] = {
        "<|im_end|>" if token == ordinary else token: number for token, number in described["model"]["vocab"].items()
    }
    described["model"]["merges"] = [pair for pair in described["model"]["merges"] if ordinary not in pair]
    tokens.write_text(json.dumps(described))
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    add_vocabulary(writer, model, 300)
    found = {name.rpartition(".")[2]: field.value for name, field in writer.kv_data[0].items()}
    assert found["eos_token_id"] == 1
    named = {name: found[f"{name}_token_id"] for name in ("eot", "eom") if f"{name}_token_id" in found}
    assert named == keys
    said = capsys.readouterr().out
    assert ("does not stop at" in said) == (left is not None)
    assert left is None or said.strip().endswith(left)
