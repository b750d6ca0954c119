"""The target gguf: llama.cpp's results equal those of transformers for every family and weight type."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tasks.benchmark import benchmark
from tasks.errors import TaskError
from tasks.export import export
from tasks.output import whole_directory, write_manifest
from tasks.quantize import quantize
from tasks.runtimes import Question, load_runtime
from tasks.runtimes.dense import load_dense
from tasks.scoring.completions import complete
from tasks.settings import BenchmarkSettings, check_settings
from tasks.statistics import collect
from tests.mixed import mixed_model
from tests.tiny import FAMILIES, LLAMA3, Corpus, tiny_model

pytestmark = pytest.mark.gguf

QUESTIONS = [
    Question((5, 9, 30), ((7,), (8, 9, 10), (11, 12))),
    Question((5, 9, 30, 31, 32, 40, 41), ((7, 8), (100,))),
    Question((3,), ((4, 5, 6, 7, 8),)),
]
Change = Callable[[dict[str, Any]], None]


def whole(model: Path, folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """A copy with a manifest, in float32: neither runtime rounds activations for such weights."""
    with whole_directory(folder) as work:
        for file in model.iterdir():
            (work / file.name).write_bytes(file.read_bytes())
        tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
        numbers = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if name.endswith("bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=numbers) * 0.5)
        save_file(tensors, work / "model.safetensors", {"format": "pt"})
        config = json.loads((model / "config.json").read_text()) | {"dtype": "float32"} | (changes or {})
        (work / "config.json").write_text(json.dumps(config))
    return folder


def exported(model: Path, folder: Path) -> Path:
    export(model, "gguf", folder)
    return folder


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        ("llama", {"attention_bias": True}),
    ],
    ids=[*FAMILIES, "llama3", "linear", "biases"],
)
def test_each_family_computes_what_transformers_computes(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    made = tiny_model(tmp_path / "made", family=family)
    if "attention_bias" in changes:
        _add_biases(made)
    model = whole(made, tmp_path / "model", changes)
    ours = load_runtime("gguf", exported(model, tmp_path / "export"), "float32")
    theirs = load_runtime("transformers", model, "float32")
    ids = torch.randint(400, (2, 100), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.logprobs(ids), theirs.logprobs(ids), atol=2e-3, rtol=1e-3)


def _add_biases(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    for name in list(tensors):
        if "self_attn" in name and name.endswith("proj.weight"):
            tensors[name.replace(".weight", ".bias")] = torch.zeros(len(tensors[name]))
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def model(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(llama, tmp_path_factory.mktemp("models") / "source")


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(model, tmp_path_factory.mktemp("exports") / "base")


def test_scores_and_text_equal_those_of_transformers(model: Path, base: Path) -> None:
    ours, theirs = (load_runtime(t, d, "float32") for t, d in (("gguf", base), ("transformers", model)))
    for batch_tokens in (1, 4096):
        for found, expected in zip(
            ours.score(QUESTIONS, batch_tokens, "a"), theirs.score(QUESTIONS, 64, "b"), strict=True
        ):
            assert [s.logprob for s in found] == pytest.approx([s.logprob for s in expected], abs=1e-2)
            assert [s.greedy for s in found] == [s.greedy for s in expected]
    ids = torch.tensor([[5, 9, 30, 31], [40, 41, 42, 43]])
    assert torch.equal(ours.generate_ids(ids, 9), theirs.generate_ids(ids, 9))
    assert torch.equal(ours.generate_ids(ids[:, :2], 3), theirs.generate_ids(ids[:, :2], 3))
    assert ours.generate("Ada repairs the", 12) == theirs.generate("Ada repairs the", 12) != ""
    assert (ours.info.dtype, ours.info.threads, ours.fast) == ("float32", torch.get_num_threads(), True)


def test_greedy_texts_equal_those_of_transformers(model: Path, base: Path) -> None:
    ours, theirs = (load_runtime(t, d, "float32") for t, d in (("gguf", base), ("transformers", model)))
    texts = ["Ada repairs the lamp", "Ben", "Cleo"]
    for found, expected in zip(complete(ours, [1], texts), complete(theirs, [1], texts), strict=True):
        assert (found.prompt_ids, found.ids, found.text) == (expected.prompt_ids, expected.ids, expected.text)
        best, known = (list(chain.from_iterable(one.best_logprobs)) for one in (found, expected))
        assert best == pytest.approx(known, abs=1e-2)


def test_more_continuations_than_sequences_are_split(model: Path, base: Path) -> None:
    question = Question((5, 9, 30), tuple((i, i + 1) for i in range(3, 153)))
    ours, theirs = (
        load_runtime(t, d, "float32").score([question, QUESTIONS[0]], 512, "a")
        for t, d in (("gguf", base), ("transformers", model))
    )
    for found, expected in zip(ours, theirs, strict=True):
        assert [s.logprob for s in found] == pytest.approx([s.logprob for s in expected], abs=1e-2)


def test_text_ends_at_the_end_token(base: Path, tmp_path: Path) -> None:
    runtime: Any = load_runtime("gguf", base, "float32")
    first = runtime.tokenizer("Ada repairs the").input_ids
    written = runtime.generate_ids(torch.tensor([first]), 3)[0, len(first) :].tolist()
    text = runtime.generate("Ada repairs the", 3)
    assert text == runtime.tokenizer.decode(written)


PARAMS = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
VARIANTS: dict[str, dict[str, Any]] = {
    "int8": PARAMS["variants"]["int8"],
    "gptq": {**PARAMS["variants"]["gptq-int4"], "group_size": 32},
    "symmetric": {**PARAMS["variants"]["gptq-int4"], "group_size": 32, "scheme": "W4A16"},
    "output-layer": {**PARAMS["variants"]["gptq-int4"], "group_size": 32, "output_layer": "W8A16@32"},
    "output-layer-4": {**PARAMS["variants"]["gptq-int4"], "group_size": 32, "output_layer": "W4A16_ASYM@32"},
    "awq": {**PARAMS["variants"]["awq-int4"], "group_size": 32, "format": "awq"},
    "weighed": {"scheme": "Q4_K_M", "imatrix": True},
    "plain": {"scheme": "Q4_K_M"},
}


@pytest.fixture(scope="module")
def pressed(model: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each variant's output of the quantize stage, made once; next to it a file with its bits per weight."""
    root = tmp_path_factory.mktemp("pressed")
    tokens: Any = load_runtime("transformers", model, "float32").tokenizer(corpus.text.read_text()).input_ids
    with whole_directory(root / "calibration") as work:
        save_file({"input_ids": torch.tensor(tokens[: 16 * 32]).view(16, 32)}, work / "tokens.safetensors")
    collect(model, root / "calibration", root / "statistics", importance=True)

    def make(name: str) -> Path:
        if not (root / name).exists():
            settings = check_settings(
                {**PARAMS, "targets": ["gguf"], "variants": {"base": {"scheme": "none"}, **VARIANTS}}
            )
            report = quantize(
                name, settings.variant(name), model, root / "calibration", root / "statistics", root / name
            )
            (root / f"{name}.bits").write_text(str(report.bits_per_weight))
            assert all(error < 0.35 for error in report.layers.values())  # llama.cpp's own types have none
        return root / name

    return make


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_computes_with_its_stored_weights(
    name: str, pressed: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = exported(pressed(name), tmp_path / "export")
    ours = load_runtime("gguf", folder, "float32")
    ids: Any = torch.tensor([ours.tokenizer("Ada repairs the lamp of Ben near the harbour at dawn. " * 6).input_ids])
    if name.startswith("output-layer"):  # Transformers cannot separate it from the embedding
        with torch.inference_mode():
            theirs = load_dense(pressed(name), torch.float32)(ids).logits.log_softmax(-1)
    else:
        theirs = load_runtime("transformers", pressed(name), "float32").logprobs(ids)
    found, expected = (one[0, :-1].gather(1, ids[0, 1:, None]).mean().item() for one in (ours.logprobs(ids), theirs))
    # 8-bit activations in blocks, float16 scales
    assert found == pytest.approx(expected, abs=0.02)


def test_mixed_model_computes_with_its_stored_weights(model: Path, tmp_path: Path) -> None:
    pressed = mixed_model(model, tmp_path / "pressed")
    write_manifest(pressed)
    theirs = load_runtime("transformers", pressed, "float32")
    ours = load_runtime("gguf", exported(pressed, tmp_path / "export"), "float32")
    ids = torch.randint(400, (1, 100), generator=torch.Generator().manual_seed(1))
    expected = theirs.logprobs(ids)
    divergence = (expected.exp() * (expected - ours.logprobs(ids))).sum(-1).mean().item()
    assert 0 < divergence < 1e-3


def test_llama_cpps_mixture_is_reported(pressed: Callable[[str], Path]) -> None:
    folder = pressed("plain")
    assert sorted(p.name for p in folder.iterdir() if p.suffix in (".gguf", ".safetensors", ".part")) == ["model.gguf"]
    # no width is a multiple of 256, so Q4_K became Q5_0, and Q6_K Q8_0
    assert 5.5 <= float(folder.with_suffix(".bits").read_text()) <= 7
    weighed = (pressed("weighed") / "model.gguf").read_bytes()
    assert weighed != (folder / "model.gguf").read_bytes()


def test_a_benchmark_has_speeds(base: Path) -> None:
    settings = BenchmarkSettings(dtype="float32", prompt_tokens=8, new_tokens=4, batch_size=2, repeats=1)
    report = benchmark("base", settings, "gguf", base, base)
    assert report.fast_kernel
    assert report.decode_tokens_per_second
    assert report.runtime.name == "llama-cpp-python"


@pytest.mark.parametrize("first", [True, False])
def test_sentencepiece_style_tokenizer(model: Path, first: bool, tmp_path: Path) -> None:
    sentencepiece(corpus_text(), first).save_pretrained(tmp_path / "tokenizer")
    other = whole(model, tmp_path / "model")
    for file in other.glob("*token*"):
        file.unlink()
    for file in (tmp_path / "tokenizer").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    exported(other, tmp_path / "export")  # compares the tokens of both


def corpus_text() -> list[str]:
    return ["Ada repairs the lamp of Ben.", "He's told 33 stories, 3333 times!!", "f(x): return x**2 # the end"] * 9


def sentencepiece(texts: list[str], first: bool) -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's; `first`: it prepends a space to a text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    described = json.loads(bpe.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    bpe = Tokenizer.from_str(json.dumps(described))
    bpe.pre_tokenizer = None
    steps: list[Any] = [normalizers.Prepend("\u2581")] if first else []
    bpe.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_tokenizer_that_llama_cpp_reads_differently_is_refused(model: Path, tmp_path: Path) -> None:
    other = whole(model, tmp_path / "model")
    described = json.loads((other / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(TaskError, match="produces other tokens"):
        exported(other, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_invalid_file_is_refused_with_llama_cpps_message(base: Path, tmp_path: Path) -> None:
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(TaskError, match=r"llama.cpp cannot load .*model.gguf: .*(tensor|bounds|load)"):
        load_runtime("gguf", tmp_path, "float32")
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(TaskError, match="holds 0 GGUF files"):
        load_runtime("gguf", tmp_path, "float32")
