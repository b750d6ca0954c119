"""The transformers runtime: scores equal those of one forward pass per continuation, and lm-eval's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.errors import TaskError
from tasks.quantizers import QuantizeJob, press
from tasks.runtimes import Question, load_runtime
from tasks.runtimes.transformers import TransformersRuntime
from tasks.scoring.lm_eval_adapter import RuntimeLM
from tasks.settings import load_settings
from tasks.statistics import collect


@pytest.fixture(scope="module")
def runtime(llama: Path) -> TransformersRuntime:
    return TransformersRuntime(llama, "float32")


QUESTIONS = [
    Question((5, 9, 30), ((7,), (8, 9, 10), (11, 12))),
    Question((5, 9, 30, 31, 32, 40, 41), ((7, 8), (100,))),
    Question((3,), ((4, 5, 6, 7, 8),)),
]


def test_tree_scores_equal_separate_sequences(llama: Path, runtime: TransformersRuntime) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    for question, scores in zip(QUESTIONS, runtime.score(QUESTIONS, 64, "test"), strict=True):
        for continuation, score in zip(question.continuations, scores, strict=True):
            ids = torch.tensor([[*question.context, *continuation]])
            with torch.inference_mode():
                rows = model(ids).logits[0, len(question.context) - 1 : -1].log_softmax(-1)
            expected = rows.gather(1, torch.tensor(continuation)[:, None]).sum().item()
            assert score.logprob == pytest.approx(expected, abs=1e-4)
            assert score.greedy == (rows.argmax(-1).tolist() == list(continuation))


@pytest.mark.parametrize("batch_tokens", [1, 16, 4096])
def test_batch_size_does_not_change_scores(runtime: TransformersRuntime, batch_tokens: int) -> None:
    expected = runtime.score(QUESTIONS, 64, "test")
    for row, other in zip(expected, runtime.score(QUESTIONS, batch_tokens, "test"), strict=True):
        assert [s.logprob for s in row] == pytest.approx([s.logprob for s in other], abs=1e-4)


def test_greedy_continuation_is_detected(runtime: TransformersRuntime) -> None:
    context = torch.tensor([[5, 9, 30]])
    written = runtime.generate_ids(context, 4)[0, 3:].tolist()
    (scores,) = runtime.score([Question((5, 9, 30), (tuple(written), (1, 1)))], 64, "test")
    assert [s.greedy for s in scores] == [True, False]


def test_lm_eval_scores_equal_its_own_model(llama: Path, runtime: TransformersRuntime) -> None:
    asked = [("Question: Who? Answer:", " Anna"), ("Question: Who? Answer:", " the old bridge"), ("", "A story")]
    requests = [Instance("loglikelihood", {}, args, i) for i, args in enumerate(asked)]
    texts = [Instance("loglikelihood_rolling", {}, ("Anna saw the river. " * 40,), 0)]
    ours = RuntimeLM(runtime, 256, 128)
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(llama),
        max_length=128,
        device="cpu",
    )
    for (a, greedy), (b, also) in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert a == pytest.approx(b, abs=1e-3)
        assert greedy == also
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-2)


def test_generated_text_stops_at_the_stop_string(runtime: TransformersRuntime) -> None:
    text = runtime.generate("Anna", 12)
    assert len(text) > 2
    stop = text[2]
    request = Instance("generate_until", {}, ("Anna", {"until": [stop], "max_gen_toks": 12}), 0)
    (answer,) = RuntimeLM(runtime, 256, 128).generate_until([request])
    assert answer == text.split(stop)[0]


def test_quantized_model_can_be_moved_to_a_device(llama: Path, tmp_path: Path) -> None:
    """As on a GPU; compressed-tensors alone keeps computing on the device that loaded it."""
    settings = load_settings(Path("params.yaml"))
    variant = settings.variant("gptq-int4")
    tokens = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens}, tmp_path / "tokens.safetensors")
    collect(llama, tmp_path, tmp_path / "statistics", importance=False)
    (pressed := tmp_path / "pressed").mkdir()
    press(QuantizeJob(llama, tokens, tmp_path / "statistics", variant, "cpu", pressed))
    for file in llama.glob("tokenizer*"):
        (pressed / file.name).write_bytes(file.read_bytes())
    moved = TransformersRuntime(pressed, "float32").model.to("meta")
    layer = moved.model.layers[0].self_attn.q_proj
    assert layer(torch.zeros(1, layer.in_features, device="meta")).is_meta
    assert all(parameter.is_meta for parameter in moved.parameters())


def test_a_folder_without_a_model_and_an_unknown_target_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="holds no model"):
        load_runtime("transformers", tmp_path, "float32")
    with pytest.raises(TaskError, match="no runtime for the target 'tpu'"):
        load_runtime("tpu", llama, "float32")
