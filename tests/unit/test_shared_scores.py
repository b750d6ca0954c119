"""Scores of many kinds of models are the model's own: those of one plain pass per continuation, alone in its batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.activation_rounding import Activations, round_inputs
from tasks.runtimes import Question, Score
from tasks.runtimes.shared_context import score_shared
from tasks.runtimes.shared_proof import COARSE, EXACT, _tolerance, longest_shared
from tasks.runtimes.transformers import TransformersRuntime
from tasks.runtimes.w8a8 import Int8Linear
from tests.tiny import randomize, tiny_tokenizer

WINDOW = 8
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# contexts of several lengths, so that a batch has padding; the longest is beyond every window here
QUESTIONS = [
    Question(tuple(range(10, 62)), ((7,), (8, 9, 10, 90), (11, 12))),
    Question(tuple(range(100, 112)), ((7, 8), (100,))),
    Question((3,), ((4, 5, 6, 7, 8),)),
]
# what differs from llama: model_type, its settings, and whether continuations may share a context's pass
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, True),
    "capped logits": ("gemma2", {"sliding_window": 256, "final_logit_softcapping": 0.5}, True),
    "scaled logits": ("granite", {"logits_scaling": 8.0}, True),
    "scaled logits, layer norm": ("cohere", {"logit_scale": 0.1}, True),
    "window": ("mistral", {"sliding_window": WINDOW}, False),
    "window in every second layer": ("gemma2", {"sliding_window": WINDOW}, False),
    "sinks": ("gpt_oss", {"sliding_window": WINDOW, "num_local_experts": 4}, False),
    "state": ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}, False),
    "state and attention": (
        "jamba",
        {"use_mamba_kernels": False, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
        False,
    ),
    "positions in the mask": ("bloom", {"n_head": 4, "n_layer": 2}, False),
}


def make(folder: Path, family: str, settings: dict[str, Any]) -> Path:
    """Write a random model in float32, with logits about 2 apart, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**SIZES, **settings})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def alone(folder: Path) -> list[list[Score]]:
    """Scores of a pass for each continuation, alone in its batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [[_alone(model, question.context, one) for one in question.continuations] for question in QUESTIONS]


def _alone(model: Any, context: tuple[int, ...], continuation: tuple[int, ...]) -> Score:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    return Score(chosen.sum().item(), logits.argmax(-1).tolist() == list(continuation))


def assert_equal(found: list[list[Score]], expected: list[list[Score]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert [score.logprob for score in ours] == pytest.approx([score.logprob for score in theirs], abs=1e-3)
        assert [score.greedy for score in ours] == [score.greedy for score in theirs]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_models_own(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family, settings, shares = KINDS[kind]
    folder = make(tmp_path, family, settings)
    expected = alone(folder)
    runtime = TransformersRuntime(folder, "float32")
    for batch_tokens in (16, 256):
        assert_equal(runtime.score(QUESTIONS, batch_tokens, ""), expected)
    said = capsys.readouterr().err
    assert said.count("are scored in plain passes: ") == (not shares)  # once for a loaded model


def test_beyond_a_window_that_the_probe_does_not_reach_passes_are_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probe reads 56 tokens, the window has 60, the longest question 62: sharing would ignore the window."""
    folder = make(tmp_path, "mistral", {"sliding_window": 60})
    longer = [Question(tuple(range(10, 70)), ((7, 8, 9, 10), (11,))), *QUESTIONS[1:]]
    monkeypatch.setattr(f"{__name__}.QUESTIONS", longer)
    shared: list[int] = []

    def count(model: Any, questions: list[Question]) -> list[list[Score]]:
        shared.append(len(questions))
        return score_shared(model, questions)

    monkeypatch.setattr("tasks.runtimes.transformers.score_shared", count)
    runtime = TransformersRuntime(folder, "float32")
    assert_equal(runtime.score(longer, 256, ""), alone(folder))
    assert sum(shared) == 2
    assert "1 of 3 questions are scored in plain passes: beyond 60 tokens" in capsys.readouterr().err
    # the shared pass alone is wrong here, so the test could fail
    difference = score_shared(runtime.model, longer[:1])[0][0].logprob - alone(folder)[0][0].logprob
    assert abs(difference) > 1e-3


@pytest.mark.parametrize("window", [30, 46])
def test_a_window_that_the_probe_hardly_exceeds_is_a_limit_too(tmp_path: Path, window: int) -> None:
    """Even if the probe shows no difference, as it may in bfloat16; here attention is full in spite of the config."""
    model = TransformersRuntime(make(tmp_path, "llama", {}), "float32").model
    assert longest_shared(model)[0] == math.inf
    model.config.sliding_window = window
    assert longest_shared(model)[0] == window
    model.config.sliding_window = WINDOW
    assert longest_shared(model)[0] == math.inf  # proven far beyond it


def test_rounded_activations_and_short_floats_get_a_coarser_proof(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama", {})
    assert _tolerance(TransformersRuntime(folder, "float32").model) == EXACT
    assert _tolerance(TransformersRuntime(folder, "bfloat16").model) == COARSE
    hooked = TransformersRuntime(folder, "float32").model
    round_inputs(hooked, {"model.layers.0.mlp.up_proj": False})
    assert _tolerance(hooked) == COARSE
    integers = TransformersRuntime(folder, "float32").model
    weight, scale = torch.zeros(64, 64, dtype=torch.int8), torch.ones(64)
    integers.model.layers[0].self_attn.o_proj = Int8Linear(weight, scale, None, Activations(symmetric=True))
    assert _tolerance(integers) == COARSE


def test_a_model_without_room_for_the_probe_is_not_called_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = TransformersRuntime(make(tmp_path, "llama", {}), "float32")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("tasks.runtimes.shared_proof.score_shared", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        runtime.score(QUESTIONS, 256, "")
