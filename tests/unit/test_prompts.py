"""Prompts and greedy text: one BOS, and nothing of the source's sampling keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tasks.runtimes.transformers import TransformersRuntime
from tasks.scoring.lm_eval_adapter import RuntimeLM
from tasks.text.bos import prompt_ids, without_bos

SAMPLING = {
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 7,
    "max_length": 9,
    "num_beams": 2,
    "num_return_sequences": 2,
    "suppress_tokens": list(range(3, 300)),
}
NEW = 12


@pytest.fixture(scope="module")
def sampling(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama, with sampling keys, whose tokenizer adds BOS and whose template writes it."""
    folder = tmp_path_factory.mktemp("sampling") / "model"
    shutil.copytree(llama, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SAMPLING))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(folder)
    return folder


def greedy(folder: Path, ids: list[int], new_tokens: int) -> list[int]:
    """The most likely token, one after another."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    written = list(ids)
    for _ in range(new_tokens):
        with torch.inference_mode():
            written.append(int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax()))
    return written


def test_sampling_keys_of_the_source_do_not_change_what_is_generated(sampling: Path) -> None:
    runtime = TransformersRuntime(sampling, "float32")
    ids = prompt_ids(runtime.tokenizer, "Anna")
    expected = greedy(sampling, ids, NEW)
    assert runtime.generate_ids(torch.tensor([ids]), NEW).tolist() == [expected]
    text = str(runtime.tokenizer.decode(expected[len(ids) :], skip_special_tokens=True))
    assert runtime.generate("Anna", NEW) == text
    (answer,) = RuntimeLM(runtime, 256, 128).generate_until(
        [Instance("generate_until", {}, ("Anna", {"until": [], "max_gen_toks": NEW, "do_sample": True}), 0)]
    )
    assert answer == text


def test_a_prompt_has_one_bos_whoever_writes_it(sampling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = TransformersRuntime(sampling, "float32")
    model = RuntimeLM(runtime, 256, 128)
    chat = model.apply_chat_template([{"role": "user", "content": "Anna"}])
    assert runtime.tokenizer(chat).input_ids[:2] == [0, 0]  # so the test could fail
    read: list[list[int]] = []
    real = runtime.model.generate

    def generate(ids: torch.Tensor, **options: object) -> object:
        read.extend(ids.tolist())
        return real(ids, **options)

    monkeypatch.setattr(runtime.model, "generate", generate)
    for prompt in (chat, "Anna"):
        runtime.generate(prompt, 1)
        assert read[-1] == model.tok_encode(prompt)
        assert read[-1].count(0) == 1
        assert read[-1][0] == 0


def test_bos_is_removed_from_calibration_chats_only_where_each_sequence_gets_its_own(
    llama: Path, sampling: Path
) -> None:
    adding: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(sampling)
    other: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(llama)
    assert without_bos(adding, "<s>Anna") == without_bos(adding, "Anna") == "Anna"
    assert without_bos(other, "<s>Anna") == "<s>Anna"
