"""The checks of a served model: each passes with a good server and fails for its fault."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
import uvicorn

from tasks.deployment.tool_calling import Template
from tasks.errors import TaskError
from tasks.scoring.completions import Completion, prompts
from tasks.scoring.divergence import Window
from tasks.scoring.lm_eval_adapter import RuntimeLM
from tasks.serving.agreement import Agreement, agreement
from tasks.serving.api import Api
from tasks.serving.checks import CHECKS, Finding, Subject, check
from tasks.serving.engines import FEATURES
from tasks.serving.process import free_port
from tasks.serving.runtime import ServedRuntime
from tests.openai_fake import Model, Server
from tests.waiting import soon

CONTEXT = 512
FAULTS = {  # the check that must notice each
    "another name": "models",
    "miscounts": "completions",
    "silent chat": "chat",
    "drops the tail of a stream": "streaming",
    "mixes a batch": "batches",
    "ignores stop": "stop strings",
    "ignores stop tokens": "stop tokens",
    "another template": "chat template",
    "log-probabilities of another token": "log-probabilities",
    "no log-probability for the last": "log-probabilities",
    "breaks on length": "too long a request",
    "names no limit": "too long a request",
    "takes any length": "too long a request",
    "writes on": "cancellation",
    "refuses tools": "tools",
    "mixes requests": "sixteen at once",
}

Serve = Callable[..., Subject]


@contextmanager
def in_thread(server: Server) -> Iterator[str]:
    """Serve in a thread; the URL."""
    port = free_port()
    found = uvicorn.Server(uvicorn.Config(server.app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=found.run)
    thread.start()
    try:
        assert soon(lambda: found.started, 20, 0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        found.should_exit = True
        thread.join(20)


@pytest.fixture
def subject() -> Iterator[Serve]:
    """Start a server with faults; the subject of the checks."""
    with ExitStack() as stack:

        def serve(*faults: str, offers: frozenset[str] = FEATURES) -> Subject:
            server = Server("m", CONTEXT, faults)
            api = Api(stack.enter_context(in_thread(server)), "m", offers, "fake:running")
            stack.callback(api.close)
            return Subject(
                api=api,
                tokenizer=server.model.tokenizer,
                prompts=prompts(),
                template=Template(chat=True, tools=True, parser="hermes"),
                context=CONTEXT,
                near=0.01,
                date="2024-07-26",
            )

        yield serve


def test_a_good_server_passes_every_check(subject: Serve) -> None:
    one = subject()
    found = [check(name, one) for name in CHECKS]
    assert [finding for finding in found if finding.state != "passed"] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_noticed_by_its_check(subject: Serve, fault: str) -> None:
    finding = check(FAULTS[fault], subject(fault))
    assert finding.state == "failed", finding
    assert "expected" in finding.detail


def test_requests_at_once_may_part_at_near_ties(subject: Serve) -> None:
    finding = check("sixteen at once", subject("near-ties flip"))
    assert finding.state == "passed"
    assert "part at a near-tie" in finding.detail


def test_a_bound_of_nothing_takes_near_ties_for_differences(subject: Serve) -> None:
    finding = check("sixteen at once", dataclasses.replace(subject("near-ties flip"), near=0.0))
    assert finding.state == "failed"
    assert "the two best tokens differ by 0.000 nats" in finding.detail


def test_what_a_server_or_a_template_lacks_is_not_offered(subject: Serve) -> None:
    one = subject(offers=frozenset())
    plain = dataclasses.replace(one, template=Template(chat=False, tools=False, parser=None))
    states = {name: check(name, plain).state for name in CHECKS}
    lacking = {"chat", "stop tokens", "chat template", "log-probabilities", "tools"}
    assert {name for name, state in states.items() if state == "not offered"} == lacking
    assert {state for name, state in states.items() if name not in lacking} == {"passed"}
    no_tools = dataclasses.replace(one, template=Template(chat=True, tools=False, parser=None))
    assert check("tools", no_tools) == Finding("tools", "not offered", "the chat template has no tools")


def test_without_token_ids_the_template_is_compared_by_its_count(subject: Serve) -> None:
    assert check("chat template", subject(offers=frozenset())).state == "passed"
    assert check("chat template", subject("another template", offers=frozenset())).state == "failed"


def test_a_server_that_has_ended_fails_every_check() -> None:
    api = Api(f"http://127.0.0.1:{free_port()}", "m", FEATURES, "fake:running")
    model = Model()
    one = Subject(api, model.tokenizer, prompts(), Template(True, True, "hermes"), CONTEXT, 0.01, "2024-07-26")
    started = time.monotonic()
    assert {check(name, one).state for name in CHECKS} == {"failed"}
    assert time.monotonic() - started < 20
    api.close()


def evaluated(model: Model, count: int = 6) -> list[Completion]:
    """What an evaluation of the invented model writes to texts.jsonl."""
    found = []
    for prompt in prompts()[:count]:
        read = model.tokenizer(prompt).input_ids
        ids = model.write(read, 24)
        best = [model.best([*read, *ids[:place]])[:2] for place in range(24)]
        text = str(model.tokenizer.decode(ids))
        found.append(
            Completion(
                prompt, read, ids, text, [[t for t, _ in one] for one in best], [[v for _, v in one] for one in best]
            )
        )
    return found


def windows(model: Model) -> dict[str, list[tuple[Window, float]]]:
    """Held-out windows with the model's loss."""
    ids = model.tokenizer(" ".join(prompts() * 3)).input_ids[:200]
    nll = -sum(model.logprob(ids[:place], ids[place]) for place in range(1, len(ids)))
    return {"news": [(Window(ids, 1), nll)]}


def compare(one: Subject, kind: str = "float32") -> Agreement:
    """The agreement of a server with what the same model wrote."""
    model = Model()
    return agreement(one.api, model.tokenizer, evaluated(model), one.alone[:6], windows(model), (kind, "float32"))


def test_the_same_model_agrees(subject: Serve) -> None:
    found = compare(subject())
    assert (found.equal, found.near_ties, found.parted, found.problems) == (6, 0, [], [])
    assert found.tokens == 199
    assert found.difference == pytest.approx(0, abs=1e-9)


def test_other_texts_do_not_agree(subject: Serve) -> None:
    found = compare(subject("other tokens"))
    assert found.equal == 0
    assert len(found.problems) == 6
    assert "token 4" in found.problems[0]


def test_a_prompt_that_is_read_otherwise_does_not_agree(subject: Serve) -> None:
    one = subject()
    model = Model()
    other = [dataclasses.replace(text, prompt_ids=[0, *text.prompt_ids]) for text in evaluated(model)]
    found = agreement(one.api, model.tokenizer, other, one.alone[:6], {}, ("float32", "float32"))
    assert (found.equal, len(found.parted)) == (0, 6)
    assert "the evaluation read [0, " in found.problems[0]


def test_shifted_log_probabilities_do_not_agree_within_any_bound(subject: Serve) -> None:
    one = subject("shifted")
    for kind in ("float32", "float16", "bfloat16", "rounded activations"):
        found = compare(one, kind)
        assert found.difference == pytest.approx(0.01)
        (problem,) = found.problems
        assert "+0.01000 nats" in problem


def test_without_ids_and_echo_texts_are_compared(subject: Serve) -> None:
    found = compare(subject(offers=frozenset()))
    assert (found.equal, found.difference, found.problems) == (6, None, [])
    assert len(compare(subject("other tokens", offers=frozenset())).parted) == 6


def test_lm_eval_scores_through_a_server(subject: Serve) -> None:
    one, model = subject(), Model()
    server = SimpleNamespace(engine="fake", version="1.0")
    runtime = ServedRuntime(server, one.api, model.tokenizer, "cpu", "float32")  # type: ignore[arg-type]
    lm = RuntimeLM(runtime, 512, CONTEXT)
    context = model.tokenizer(prompts()[0]).input_ids
    greedy = model.write(context, 3)
    other = [greedy[0], model.best([*context, greedy[0]])[1][0]]
    asked = [(("", ""), context, answer) for answer in (greedy, other, [7])] * 7  # more than fit into one request
    found = lm._loglikelihood_tokens(asked)
    for (value, is_greedy), (_, _, answer) in zip(found, asked, strict=True):
        expected = sum(model.logprob([*context, *answer[:n]], answer[n]) for n in range(len(answer)))
        assert value == pytest.approx(expected)
        assert is_greedy == (answer == greedy)
    assert runtime.generate_ids(torch.tensor([context]), 3).tolist() == [[*context, *greedy]]
    assert runtime.generate(prompts()[0], 3) == model.tokenizer.decode(greedy)
    assert runtime.info.name == "fake"
    with pytest.raises(TaskError, match="whole vocabulary"):
        runtime.logprobs(torch.tensor([context]))
    without = dataclasses.replace(one.api, offers=frozenset())
    with pytest.raises(TaskError, match="fake cannot score given texts: it has no echo, token ids"):
        ServedRuntime(server, without, model.tokenizer, "cpu", "float32")  # type: ignore[arg-type]
