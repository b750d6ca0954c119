"""Greedy texts after fixed prompts: ids, end tokens and the two best log-probabilities of each place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.runtimes.transformers import TransformersRuntime
from tasks.scoring.completions import NEW_TOKENS, complete, prompts, write_completions

TEXTS = ("Anna", "Dan repairs the lamp", "Eve", "Gus")


@pytest.fixture(scope="module")
def runtime(llama: Path) -> TransformersRuntime:
    return TransformersRuntime(llama, "float32")


def alone(folder: Path, ids: Sequence[int]) -> tuple[list[int], list[list[int]], list[list[float]]]:
    """The greedy continuation, and the two best tokens of each place, by a whole pass for every token."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    written: list[int] = []
    best_ids, best = [], []
    for _ in range(NEW_TOKENS):
        with torch.inference_mode():
            found = model(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1].log_softmax(-1).topk(2)
        best_ids.append(found.indices.tolist())
        best.append(found.values.tolist())
        written.append(best_ids[-1][0])
    return written, best_ids, best


def test_ids_and_log_probabilities_are_those_of_one_token_after_another(
    llama: Path, runtime: TransformersRuntime
) -> None:
    for text, one in zip(TEXTS, complete(runtime, (), TEXTS), strict=True):
        assert one.prompt == text
        assert one.prompt_ids == runtime.tokenizer(text).input_ids
        ids, best_ids, best = alone(llama, one.prompt_ids)
        assert (one.ids, one.best_ids) == (ids, best_ids)
        assert [p for place in one.best_logprobs for p in place] == pytest.approx(
            [p for b in best for p in b], abs=1e-4
        )
        assert one.text == runtime.tokenizer.decode(one.ids)


def test_an_end_token_is_the_last_of_its_text(runtime: TransformersRuntime) -> None:
    (whole,) = complete(runtime, (), ["Anna"])
    end = whole.ids[5]
    first = whole.ids.index(end)
    (one,) = complete(runtime, [end], ["Anna"])
    assert one.ids == whole.ids[: first + 1]
    assert one.best_ids == whole.best_ids[: first + 1]
    assert len(one.best_logprobs) == first + 1


def test_the_models_own_end_token_ends_a_text_though_the_runtime_writes_on(
    runtime: TransformersRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = complete(runtime, (), ["Anna"])
    end = whole.ids[3]
    monkeypatch.setattr(runtime.model.generation_config, "eos_token_id", end)  # which generate_ids then suppresses
    (one,) = complete(runtime, [end], ["Anna"])
    assert one.ids == whole.ids[: whole.ids.index(end) + 1]


def test_prompts_of_one_length_are_continued_together(
    runtime: TransformersRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    real = runtime.generate_ids

    def generate(ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return real(ids, new_tokens)

    monkeypatch.setattr(runtime, "generate_ids", generate)
    complete(runtime, (), ["the lamp", "the river", "the lamp of Dan"])
    lengths = [len(runtime.tokenizer(text).input_ids) for text in ("the lamp", "the lamp of Dan")]
    assert shapes == [(2, lengths[0]), (1, lengths[1])]


def test_there_are_sixteen_different_prompts_that_end_in_no_space() -> None:
    assert len(set(prompts())) == 16
    assert all(text == text.strip() for text in prompts())


def test_a_line_holds_one_text(runtime: TransformersRuntime, tmp_path: Path) -> None:
    found = complete(runtime, (), ["Anna", "Le canapé"])
    write_completions(tmp_path, found)
    lines = (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [vars(one) for one in found]
    assert "canapé" in lines[1]
