"""Local models: folders of safetensors and GGUF files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tasks.download import SourceReport, download
from tasks.errors import TaskError
from tasks.model.hollow import hollow_model
from tasks.output import checksums
from tasks.settings import ModelSettings, load_settings
from tests.gguf_file import write_gguf
from tests.tiny import CHAT_TEMPLATE, tiny_model

TEXT = "Ada paints the lamp of Ben\n\n12 times  3, near the   harbour."


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama_float(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    tensors = {n: t.float() for n, t in load_file(llama / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model that a test may damage, in a project folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(llama, tmp_path / "model"))


def take(source: str = "path:model", dtype: str = "bfloat16", **more: Any) -> SourceReport:
    settings = ModelSettings.model_validate({"source": source, "dtype": dtype, **more})
    return download(settings, Path("models/source"))


def refusal(source: str = "path:model", **more: Any) -> str:
    with pytest.raises(TaskError) as caught:
        take(source, **more)
    assert list(Path("models").iterdir()) == []
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_copied_and_never_linked_to(model: Path) -> None:
    before = checksums(model)
    report = take()
    out = Path("models/source")
    assert checksums(model) == before
    assert (out / "model.safetensors").stat().st_nlink == 1
    assert checksums(out)["model.safetensors"] == before["model.safetensors"]
    assert (report.kind, report.revision, report.pin) == ("path", None, None)
    assert report.parameters == sum(t.numel() for t in load_file(out / "model.safetensors").values())
    assert {p.name for p in out.iterdir()} >= {*before, "source.json", "manifest.json"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_precision_is_the_same_numbers_rounded(model: Path, dtype: str) -> None:
    take(dtype=dtype)
    new = load_file("models/source/model.safetensors")
    for name, tensor in load_file(model / "model.safetensors").items():
        assert new[name].dtype == getattr(torch, dtype)
        assert torch.equal(new[name], tensor.to(getattr(torch, dtype)))
    assert json.loads(Path("models/source/config.json").read_text())["dtype"] == dtype
    loaded = AutoModelForCausalLM.from_pretrained("models/source", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)


def test_shards_stay_shards(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="40KB")
    shards = sorted(p.name for p in model.glob("model-*.safetensors"))
    assert len(shards) > 1
    take(dtype="float32")
    assert sorted(p.name for p in Path("models/source").glob("*.safetensors")) == shards
    again = AutoModelForCausalLM.from_pretrained("models/source")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.float())

    (model / shards[0]).unlink()
    shutil.rmtree("models/source")
    assert shards[0] in refusal()


def test_weights_too_large_for_the_precision_are_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e30)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    said = refusal(dtype="float16")
    assert "model.norm.weight" in said
    assert "bfloat16" in said


def test_truncated_file_is_refused(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "not a complete safetensors file" in refusal()


def test_only_pickles_are_refused_by_name(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal()


def test_pickles_beside_safetensors_are_left_behind(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"x")
    (model / "training_args.bin").write_bytes(b"x")
    take()
    assert not list(Path("models/source").glob("*.bin"))


def test_a_missing_folder_is_refused(model: Path) -> None:
    assert "path:absent not found" in refusal("path:absent")


def test_a_checksum_of_a_folder_is_refused(model: Path) -> None:
    assert "set it to null" in refusal(sha256="0" * 64)


def test_a_quantized_model_is_refused(model: Path) -> None:
    edit(model / "config.json", quantization_config={"quant_method": "gptq"})
    assert "already quantized (gptq)" in refusal()


def test_an_encoder_is_refused(model: Path) -> None:
    edit(model / "config.json", model_type="bert", architectures=["BertForMaskedLM"])
    assert "BertForMaskedLM" in refusal()


def test_custom_code_is_refused(model: Path) -> None:
    (model / "modeling_mine.py").write_text("raise SystemExit('the code ran')")
    edit(model / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    assert "modeling_mine.Mine" in refusal()


def test_unneeded_custom_code_is_left_out(model: Path) -> None:
    (model / "modeling_mine.py").write_text("raise SystemExit('the code ran')")
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    take()
    assert not list(Path("models/source").glob("*.py"))
    assert "auto_map" not in json.loads(Path("models/source/config.json").read_text())


def test_failed_download_leaves_the_destination_unchanged(model: Path) -> None:
    take()
    before = checksums(Path("models/source"))
    with pytest.raises(TaskError):
        take("path:absent")
    assert checksums(Path("models/source")) == before


def test_full_disk_is_detected_before_writing(model: Path) -> None:
    # a sparse file takes no space, but its copy would
    config = AutoConfig.from_pretrained(model)
    config.vocab_size = shutil.disk_usage(model).free * 3 // 8 // config.hidden_size
    hollow_model(config, "bfloat16", model)
    assert "free some space" in refusal(dtype="float32")


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        ("Q4_1", {"bits": 4, "group_size": 32, "symmetric": False}),
        ("Q8_0", {"bits": 8, "group_size": 32, "symmetric": True}),
        ("Q5_1", None),
    ],
)
def test_a_gguf_is_dequantized(
    llama_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, grid: dict[str, Any] | None
) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf", llama_float, kind)
    report = take("path:tiny.gguf", "float32")

    assert (report.dequantized_from, report.grid, report.licence) == (kind, grid, "mit")
    found, true = load_file("models/source/model.safetensors"), load_file(llama_float / "model.safetensors")
    assert set(found) == set(true)
    type_ = gguf.GGMLQuantizationType[kind]
    for name, tensor in true.items():
        expected = tensor
        if tensor.ndim == 2:
            rounded = gguf.quants.quantize(tensor.numpy(), type_)
            expected = torch.from_numpy(gguf.quants.dequantize(rounded, type_))
            assert not torch.equal(expected, tensor)
        assert torch.allclose(found[name], expected, atol=1e-6), name
    assert "quantization_config" not in json.loads(Path("models/source/config.json").read_text())
    assert str(tmp_path) not in "".join(p.read_text() for p in Path("models/source").glob("*.json"))


def test_a_gguf_in_full_precision_was_not_quantized(
    llama_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf", llama_float, "F16")
    report = take("path:tiny.gguf")
    assert (report.dequantized_from, report.grid) == (None, None)


def test_gguf_tokenizer_gives_the_models_tokens(
    llama_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    take(f"path:{write_gguf(tmp_path / 'tiny.gguf', llama_float, words='gpt-2')}")
    mine, original = AutoTokenizer.from_pretrained("models/source"), AutoTokenizer.from_pretrained(llama_float)
    assert mine(TEXT).input_ids == original(TEXT).input_ids
    assert mine.decode(mine(TEXT).input_ids) == TEXT
    assert (mine.bos_token, mine.eos_token, mine.pad_token) == ("<s>", "</s>", "<pad>")
    assert Path("models/source/chat_template.jinja").read_text() == CHAT_TEMPLATE
    generation = json.loads(Path("models/source/generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (1, 2)


def test_a_smollm_gguf_splits_digits_off_the_space_before_them(
    llama_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    take(f"path:{write_gguf(tmp_path / 'tiny.gguf', llama_float)}")
    words = AutoTokenizer.from_pretrained("models/source").backend_tokenizer.pre_tokenizer
    assert [w for w, _ in words.pre_tokenize_str("a\n\n12")] == ["a", "ĊĊ", "1", "2"]


def test_gguf_with_an_unknown_pre_tokenization_is_refused(
    llama_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "'tekken'" in refusal(f"path:{write_gguf(tmp_path / 'tiny.gguf', llama_float, words='tekken')}")


def test_a_damaged_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "not a complete GGUF file" in refusal("path:tiny.gguf")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"lost": "model.layers.1.mlp.up_proj.weight"}, "does not give transformers model.layers.1.mlp.up_proj.weight"),
        ({"factors": True}, "scales its rotary frequencies (rope_freqs.weight)"),
    ],
)
def test_what_transformers_does_not_read_of_a_gguf_is_named(
    fault: dict[str, Any], said: str, llama_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refusal(f"path:{write_gguf(tmp_path / 'tiny.gguf', llama_float, **fault)}")


def test_one_part_of_a_gguf_is_refused(llama_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny-00001-of-00002.gguf", llama_float, parts=2)
    assert "is one of 2 parts of a GGUF file" in refusal("path:tiny-00001-of-00002.gguf")


@pytest.mark.slow
def test_the_default_model_still_knows_the_capital_of_france(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(Path(__file__).parents[2] / "params.yaml").model
    monkeypatch.chdir(tmp_path)
    report = download(settings, Path("models/source"))
    assert (report.dequantized_from, report.parameters) == ("Q4_1", 134515008)
    tokenizer = AutoTokenizer.from_pretrained("models/source")
    model: Any = AutoModelForCausalLM.from_pretrained("models/source")
    tokens = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=3)
    assert "Paris" in tokenizer.decode(tokens[0])


def test_the_stage_says_one_line_and_exits_with_1(model: Path) -> None:
    root = Path(__file__).parents[2]
    text = (root / "params.yaml").read_text()
    start, end = text.index("  source: wheel:llm"), text.index("  dtype: bfloat16")
    Path("params.yaml").write_text(text[:start] + "  source: path:absent\n" + text[end:])
    done = subprocess.run(
        [sys.executable, "-m", "tasks.download"], capture_output=True, text=True, env={"PYTHONPATH": str(root)}
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: path:absent not found")
    assert done.stderr.count("\n") == 1
