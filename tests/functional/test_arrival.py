"""Model files that contradict each other: corrected where it is harmless, refused in one line where it is not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.download import SourceReport, download
from tasks.errors import TaskError
from tasks.model.tokenizer import PROBE
from tasks.settings import ModelSettings
from tasks.tensor_files import TensorFiles
from tests.mixed import untied
from tests.tiny import tiny_model

INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LAST = "model.layers.1.mlp.down_proj.weight"
SOURCE = Path("models/source")


@pytest.fixture
def model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny model that a test may damage, in a project folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(llama, tmp_path / "model"))


def take(model: Path) -> SourceReport:
    report = download(ModelSettings(source=f"path:{model}", dtype="bfloat16"), SOURCE)
    assert json.loads((SOURCE / "source.json").read_text())["corrections"] == report.corrections
    return report


def refusal(model: Path) -> str:
    with pytest.raises(TaskError) as caught:
        take(model)
    assert not SOURCE.exists()
    said = str(caught.value)
    assert "\n" not in said
    return said


def tensors(model: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(model / "model.safetensors"))


def write(model: Path, found: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file(found, model / name, {"format": "pt"})


def edit(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(model: Path) -> dict[str, str]:
    """Split the weights in two files with an index, which is returned: all of layer 1 is in the second one."""
    found = tensors(model)
    place = {name: f"model-0000{1 + ('.layers.1.' in name)}-of-00002.safetensors" for name in found}
    for file in set(place.values()):
        write(model, {name: tensor for name, tensor in found.items() if place[name] == file}, file)
    (model / "model.safetensors").unlink()
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return place


def logits(model: Path) -> torch.Tensor:
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return torch.Tensor(loaded(torch.arange(6, 60)[None]).logits)


def test_a_sound_model_has_nothing_to_correct(model: Path) -> None:
    before = tensors(model)
    assert take(model).corrections == []
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(SOURCE).items())


def test_rotary_tables_are_left_out(model: Path) -> None:
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write(model, tensors(model) | {table: torch.ones(8)})
    assert take(model).corrections == [f"{table} left out: a rotary table, which is computed from config.json"]
    assert table not in tensors(SOURCE)


class TestIndex:
    def test_a_leftover_file_is_not_copied(self, model: Path) -> None:
        expected = logits(model)
        shard(model)
        write(model, {LAST: torch.zeros(64, 128)}, "model-00099-of-00099.safetensors")
        (said,) = take(model).corrections
        assert said == f"model-00099-of-00099.safetensors: {LAST} left out, which the index does not place there"
        assert not (SOURCE / "model-00099-of-00099.safetensors").exists()
        assert torch.equal(logits(SOURCE), expected)

    def test_a_tensor_counts_where_the_index_places_it(self, model: Path) -> None:
        whole = tensors(model)
        place = shard(model)
        first = "model-00001-of-00002.safetensors"
        write(model, dict(load_file(model / first)) | {LAST: torch.zeros(64, 128)}, first)
        (said,) = take(model).corrections
        assert said.startswith(f"{first}: {LAST} left out")
        assert torch.equal(TensorFiles(SOURCE).read(LAST), whole[LAST])
        assert json.loads((SOURCE / INDEX).read_text())["weight_map"] == place

    def test_an_index_that_names_another_file_is_corrected(self, model: Path) -> None:
        place = shard(model)
        wrong = {**place, LAST: "model-00001-of-00002.safetensors"}
        (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": wrong}))
        (said,) = take(model).corrections
        assert said == f"{LAST} is in {place[LAST]}, not in {wrong[LAST]} as the index says"
        assert json.loads((SOURCE / INDEX).read_text())["weight_map"] == place

    def test_a_tensor_that_no_file_holds_is_named(self, model: Path) -> None:
        place = shard(model)
        found = dict(load_file(model / place[LAST]))
        del found[LAST]
        write(model, found, place[LAST])
        assert f"says that {place[LAST]} holds {LAST}, but it does not, and no file does" in refusal(model)

    def test_a_damaged_one_is_one_line(self, model: Path) -> None:
        shard(model)
        (model / INDEX).write_text("{")
        assert refusal(model).startswith(f"{INDEX} is not JSON")


class TestOutputLayer:
    def test_a_copy_of_the_embedding_is_left_out(self, model: Path) -> None:
        found = tensors(model)
        write(model, found | {HEAD: found[EMBEDDING].clone()})
        assert take(model).corrections == [f"{HEAD} left out: equal to {EMBEDDING}, to which config.json ties it"]
        assert HEAD not in tensors(SOURCE)

    def test_a_copy_in_another_type_is_left_out(self, model: Path) -> None:
        found = tensors(model)
        write(model, found | {HEAD: found[EMBEDDING].float()})
        assert take(model).corrections == [f"{HEAD} left out: equal to {EMBEDDING}, to which config.json ties it"]

    def test_a_head_of_its_own_is_kept_and_untied(self, model: Path) -> None:
        found = tensors(model)
        write(model, found | {HEAD: found[EMBEDDING].flip(0).contiguous()})
        (said,) = take(model).corrections
        assert said == f"tie_word_embeddings set to false: {HEAD} differs from {EMBEDDING}"
        assert json.loads((SOURCE / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(tensors(SOURCE)[HEAD], found[EMBEDDING].flip(0))
        loaded = AutoModelForCausalLM.from_pretrained(SOURCE)
        assert torch.equal(loaded.lm_head.weight, found[EMBEDDING].flip(0))

    def test_an_untied_model_without_one_is_refused(self, model: Path) -> None:
        apart = untied(model, Path("apart").absolute())
        found = tensors(apart)
        del found[HEAD]
        write(apart, found)
        assert refusal(apart).startswith(f"the files have no {HEAD}, and config.json does not tie")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.pop(LAST), f"1 are missing ({LAST})"),
        (
            lambda found: found.update({"model.extra.weight": torch.ones(2)}),
            "1 are not part of it (model.extra",
        ),
        (
            lambda found: found.update({LAST: torch.ones(64, 64)}),
            f"{LAST} has the shape [64, 64], but config.json describes [64, 128]",
        ),
    ],
)
def test_other_tensors_than_the_models_are_refused(
    model: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    found = tensors(model)
    change(found)
    write(model, found)
    assert words in refusal(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named(model: Path, value: float) -> None:
    found = tensors(model)
    found[LAST][3, 5] = value
    write(model, found)
    assert refusal(model).startswith(f"{LAST} holds 1 numbers that are not finite")


def test_what_says_nothing_about_the_model_is_removed_from_its_configuration(model: Path) -> None:
    edit(model, quantization_config=None, attn_implementation="flash_attention_2")
    removed = ["quantization_config", "attn_implementation"]
    assert [said.partition(" ")[0].rstrip(":") for said in take(model).corrections] == removed
    assert not set(removed) & json.loads((SOURCE / "config.json").read_text()).keys()
    logits(SOURCE)


class TestTokenizer:
    def test_class_that_changes_the_tokens_is_corrected(self, model: Path) -> None:
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))
        expected = Tokenizer.from_file(str(model / "tokenizer.json")).encode(PROBE, add_special_tokens=False).ids
        assert AutoTokenizer.from_pretrained(model)(PROBE, add_special_tokens=False).input_ids != expected
        (said,) = take(model).corrections
        assert said.startswith("tokenizer_class set to PreTrainedTokenizerFast: LlamaTokenizerFast changes the tokens")
        assert AutoTokenizer.from_pretrained(SOURCE)(PROBE, add_special_tokens=False).input_ids == expected

    def test_token_without_a_row_in_the_embedding_is_refused(self, model: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = len(tokenizer)
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(model)
        assert f"the token '<new>' with the id {rows}, but the embedding has only {rows} rows" in refusal(model)


EXPERT, ROUTER = "model.layers.1.mlp.experts.1.down_proj.weight", "model.layers.1.mlp.gate.weight"
STACK = r"model.layers.[01].mlp.experts.(gate_up|down)_proj"


class TestExperts:
    """Faulty mixtures: their matrices have other names and shapes on disk than in memory."""

    @pytest.fixture(scope="class")
    def sound(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        return tiny_model(tmp_path_factory.mktemp("mixture"), family="qwen3_moe", changes=experts)

    @pytest.fixture
    def mixture(self, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        return Path(shutil.copytree(sound, tmp_path / "model"))

    @pytest.mark.parametrize(
        ("name", "change", "said"),
        [
            (EXPERT, None, rf"{STACK} has the shape .3, "),
            (EXPERT.replace("down", "gate"), None, rf"do not make {STACK}"),
            (ROUTER, None, rf"1 are missing .{ROUTER}."),
            (
                ROUTER,
                lambda one: one.repeat(2, 1),
                rf"{ROUTER} has the shape .8, 64., but config.json describes .4, 64",
            ),
            (EXPERT.replace(".1.down", ".7.down"), lambda _: torch.ones(64, 64), rf"{STACK} has the shape .5, "),
            (EXPERT, lambda one: one * float("inf"), f"{EXPERT} holds [0-9]+ numbers that are not finite"),
            (EXPERT, lambda one: one.to(torch.float8_e4m3fn), f"{EXPERT} in .* is stored as F8_E4M3"),
            (EXPERT, lambda one: one.to(torch.int8), f"{EXPERT} in .* is stored as I8"),
        ],
    )
    def test_a_wrong_tensor_is_named(
        self, mixture: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None, said: str
    ) -> None:
        found = tensors(mixture)
        one = found.pop(name, torch.empty(0))
        write(mixture, found if change is None else found | {name: change(one)})
        assert re.search(said, refusal(mixture))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"num_local_experts": 8}, "has the shape .4, 64.*, but config.json describes .8"),
            ({"num_local_experts": 2}, "has the shape .4, 64.*, but config.json describes .2"),
            ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but num_local_experts is 4"),
            ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, but num_local_experts is 4"),
            ({"moe_intermediate_size": 32}, rf"{STACK} has the shape"),
            ({"head_dim": 32}, "_norm.weight has the shape .16., but config.json describes .32"),
            ({"num_hidden_layers": 3}, "are missing .model.layers.2"),
            ({"num_hidden_layers": 1}, "are not part of it .model.layers.1"),
            ({"rope_parameters": None, "rope_scaling": {"rope_type": "other", "factor": 2.0}}, "KeyError: 'other'"),
            ({"hidden_act": "other"}, "cannot build the qwen3_moe model .* KeyError: 'other'"),
            ({"pad_token_id": 9999}, "cannot build the qwen3_moe model .* Padding_idx"),
            ({"rms_norm_eps": "1e-6"}, "cannot read config.json: .* expected float, got str"),
            ({"layer_types": ["full_attention"]}, "cannot read config.json: .* must be equal to the number of"),
        ],
    )
    def test_a_wrong_configuration_is_refused(self, mixture: Path, changes: dict[str, Any], said: str) -> None:
        edit(mixture, **changes)
        assert re.search(said, refusal(mixture))

    def test_a_lost_file_of_an_expert_is_named(self, mixture: Path) -> None:
        place = shard(mixture)
        (mixture / place[EXPERT]).unlink()
        assert f"the model's index says that {place[EXPERT]} holds" in refusal(mixture)

    def test_shards_may_have_other_names(self, mixture: Path) -> None:
        whole, place = tensors(mixture), shard(mixture)
        others = {file: f"model.safetensors-{file.removeprefix('model-')}" for file in place.values()}
        for file, other in others.items():
            (mixture / file).rename(mixture / other)
        renamed = {name: others[file] for name, file in place.items()}
        (mixture / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": renamed}))
        assert take(mixture).corrections == []
        assert torch.equal(TensorFiles(SOURCE).read(EXPERT), whole[EXPERT])

    def test_factors_for_other_blocks_are_named(self, mixture: Path) -> None:
        found = tensors(mixture)
        found |= {EXPERT: found[EXPERT].to(torch.float8_e4m3fn), f"{EXPERT}_scale_inv": torch.ones(1, 1)}
        write(mixture, found)
        edit(mixture, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
        assert f"{EXPERT}_scale_inv has the shape [1, 1], but blocks of [16, 16] in [64, 64]" in refusal(mixture)


def test_token_without_a_row_is_found_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model(tmp_path / "model", family="gpt2", changes={"n_positions": 64})
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    assert "the token '<new>' with the id" in refusal(model)


class TestBlocks:
    """Models that their makers publish in FP8 by blocks, or in MXFP4."""

    def test_fp8_is_dequantized_by_its_factors(self, model: Path) -> None:
        found, right = tensors(model), {}
        for name, weight in list(found.items()):
            if weight.dim() == 2 and "proj" in name:
                rows, columns = weight.shape
                factors = torch.rand(-(-rows // 48), -(-columns // 32)) + 0.5  # 48 does not divide the rows
                found[name] = (torch.randn(weight.shape) * 8).to(torch.float8_e4m3fn)
                found[f"{name}_scale_inv"] = factors
                each = torch.empty(rows, columns)
                for row in range(rows):
                    for column in range(columns):
                        each[row, column] = factors[row // 48, column // 32]
                right[name] = (found[name].float() * each).bfloat16()
            else:
                right[name] = weight
        write(model, found)
        edit(model, quantization_config={"quant_method": "fp8", "weight_block_size": [48, 32], "fmt": "e4m3"})
        report = take(model)
        assert (report.dequantized_from, report.grid) == ("FP8", None)
        assert any("dequantized" in one for one in report.corrections)
        taken = tensors(SOURCE)
        assert taken.keys() == right.keys()
        assert all(torch.equal(taken[name], right[name]) for name in right)
        assert "quantization_config" not in json.loads((SOURCE / "config.json").read_text())

    def test_fp8_in_shards_keeps_its_index(self, model: Path) -> None:
        found = tensors(model)
        found[LAST], found[f"{LAST}_scale_inv"] = found[LAST].to(torch.float8_e4m3fn), torch.ones(4, 4)
        write(model, found)
        edit(model, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 32]})
        place = shard(model)
        place[f"{LAST}_scale_inv"] = next(file for file in place.values() if file != place[LAST])
        for file in set(place.values()):
            write(model, {name: tensor for name, tensor in found.items() if place[name] == file}, file)
        (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
        take(model)
        assert torch.equal(TensorFiles(SOURCE).read(LAST), found[LAST].to(torch.bfloat16))
        assert f"{LAST}_scale_inv" not in json.loads((SOURCE / INDEX).read_text())["weight_map"]

    def test_missing_factors_are_named(self, model: Path) -> None:
        found = tensors(model)
        found[LAST] = found[LAST].to(torch.float8_e4m3fn)
        write(model, found)
        edit(model, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 32]})
        assert f"the model is in FP8, but its files hold no {LAST}_scale_inv" in refusal(model)

    def test_mxfp4_is_dequantized_as_by_transformers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        monkeypatch.chdir(tmp_path)
        experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
        model = tiny_model(tmp_path / "model", family="gpt_oss", changes=experts)
        found, right = tensors(model), {}
        for name in [name for name in found if name.endswith(("gate_up_proj", "down_proj"))]:
            count, width, rows = found.pop(name).shape
            blocks = torch.randint(0, 256, (count, rows, width // 32, 16), dtype=torch.uint8)
            exponents = torch.randint(118, 130, (count, rows, width // 32), dtype=torch.uint8)
            found[f"{name}_blocks"], found[f"{name}_scales"] = blocks, exponents
            right[name] = convert_moe_packed_tensors(blocks, exponents, dtype=torch.bfloat16)
        write(model, found)
        edit(model, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
        assert take(model).dequantized_from == "MXFP4"
        taken = tensors(SOURCE)
        assert right
        assert all(torch.equal(taken[name], weight) for name, weight in right.items())

    def test_other_quantized_models_are_refused(self, model: Path) -> None:
        edit(model, quantization_config={"quant_method": "fp8", "activation_scheme": "static"})
        assert "already quantized (fp8)" in refusal(model)
