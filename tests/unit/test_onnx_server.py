"""The server for ONNX exports, as a process of a copied folder, asked over HTTP with the official client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import psutil
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tasks.deployment.shape import read_shape
from tasks.deployment.write import write_serving
from tasks.environments import clean, interpreter, locked
from tasks.export import export
from tasks.output import checksums, write_manifest
from tasks.runtimes.onnx import OnnxRuntime
from tasks.serving.onnx_server.export_folder import read_export
from tasks.settings import check_settings
from tests.tiny import CONTEXT, tiny_model

SOURCE = Path("tasks/serving/onnx_server")
NEAR = 1e-4  # nats
LONG = 8192  # context of a model whose texts take seconds
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Ada repairs the lamp"},
]
TEXTS = ["Ada repairs the lamp", "Ben", "Cleo hides a letter in the garden", "June sells the kettle at dawn"]


class Served:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], port: int, key: str = "none") -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            http_client=httpx2.Client(trust_env=False, timeout=60),
        )

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, **body: Any) -> Any:
        return self.post("/v1/completions", **body).raise_for_status().json()

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"onnx_server_{name}"))

    def wait(self, name: str, value: float, seconds: float = 5.0) -> None:
        until = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < until, f"{name} is {self.metric(name)}, expected {value}"
            time.sleep(0.02)


@pytest.fixture(scope="session")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds a copy of the package, as in a bundle."""
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(SOURCE, folder / "onnx_server", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def exported(folder: Path, **options: Any) -> Path:
    tiny_model(folder / "model", **options)
    write_manifest(folder / "model")
    export(folder / "model", "onnx", folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("served"), steps=60)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("slow"), changes={"max_position_embeddings": LONG})


@contextmanager
def serving(copied: Path, model: Path, *arguments: str, key: str = "none", **environment: str) -> Iterator[Served]:
    with started(copied, str(copied), str(model), *arguments, key=key, **environment) as served:
        yield served


@contextmanager
def started(folder: Path, path: str, *arguments: str, key: str = "none", **environment: str) -> Iterator[Served]:
    """The server, started in `folder` with the packages of `path`."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {**clean(), "PYTHONPATH": path, **environment}
    variables.pop("ORT_DISABLE_TELEMETRY", None)
    command = [str(interpreter("onnx")), "-m", "onnx_server", *arguments, "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, cwd=folder, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        served = Served(process, port, key)
        until = time.monotonic() + 60
        while True:
            assert process.poll() is None, process.communicate()[1]
            try:
                if served.http.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                assert time.monotonic() < until
            time.sleep(0.1)
        yield served
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(copied: Path, model: Path) -> Iterator[Served]:
    with serving(copied, model, "--max-body-kib", "64") as served:
        yield served


@pytest.fixture(scope="module")
def runtime(model: Path) -> OnnxRuntime:
    return OnnxRuntime(model, "float32")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    return loaded


def greedy(runtime: OnnxRuntime, ids: list[int], count: int) -> list[int]:
    """The text of the runtime of the evaluation, up to the end token."""
    found: list[int] = runtime.generate_ids(torch.tensor([ids]), count)[0, len(ids) :].tolist()
    return found[: found.index(1) + 1] if 1 in found else found


class TestPackage:
    def test_a_copy_needs_none_of_this_project(self, copied: Path) -> None:
        code = (
            "import sys, onnx_server.server, onnx_server.worker\n"
            "print([name for name in sys.modules if name in ('torch', 'transformers', 'tasks')])\n"
        )
        environment = {**clean(), "PYTHONPATH": str(copied)}
        command = [str(interpreter("onnx")), "-c", code]
        done = subprocess.run(command, cwd=copied, env=environment, capture_output=True, text=True)
        assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr

    @pytest.mark.parametrize("library", ["onnxruntime", "onnxruntime-genai"])
    def test_what_writes_the_graph_has_the_version_of_what_runs_it(self, library: str) -> None:
        assert locked("onnx")[library] == metadata.version(library)

    @pytest.mark.parametrize("program", ["server", "runtime", "exporter"])
    def test_onnx_runtime_sends_nothing_home(self, copied: Path, program: str) -> None:
        module = {
            "server": "onnx_server.worker",
            "runtime": "tasks.engines.onnx",
            "exporter": "tasks.exporters.onnx.graph",
        }[program]
        # in the environment of the process, where the library reads it, and before the library is loaded
        code = (
            "import sys, os, importlib.abc\n"
            "class Seen(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        if name.startswith('onnxruntime'): sys.exit(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
            "sys.meta_path.insert(0, Seen())\n"
            f"import {module}\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        environment["PYTHONPATH"] = os.pathsep.join((str(copied), str(Path.cwd())))
        python = sys.executable if program == "exporter" else str(interpreter("onnx"))
        done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stderr == "1\n"


class TestBundle:
    def test_it_serves_as_the_readme_says(
        self, model: Path, runtime: OnnxRuntime, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        bundle = shutil.copytree(model, tmp_path / "bundle")
        params = yaml.safe_load(Path("params.yaml").read_text())
        params["targets"] = ["onnx"]
        write_serving(bundle, check_settings(params), "onnx", "awq-int4")
        before = checksums(bundle)
        text = (bundle / "serve/README.md").read_text()
        (command,) = re.findall(r"^python -m onnx_server (.*)$", text, re.MULTILINE)
        (variables,) = re.findall(r"^export (PYTHONPATH.*?) *(?:#.*)?$", text, re.MULTILINE)
        environment = dict(one.split("=") for one in variables.split())
        path = environment.pop("PYTHONPATH")
        name = params["package"]["name"]
        with started(bundle, path, *command.split(), key="secret", ONNX_SERVER_API_KEY="secret", **environment) as one:
            assert one.post("/v1/completions", prompt=TEXTS[0]).status_code == 401
            stranger = {"Authorization": "Bearer secre"}
            assert one.http.get("/v1/models", headers=stranger).status_code == 401
            assert [listed.id for listed in one.client.models.list()] == [name]
            answer = one.client.completions.create(model=name, prompt=TEXTS[0], max_tokens=8, temperature=0)
            expected = greedy(runtime, tokenizer(TEXTS[0]).input_ids, 8)
            shown = expected[:-1] if expected[-1] == 1 else expected
            whole = [*tokenizer(TEXTS[0]).input_ids, *shown]
            assert TEXTS[0] + answer.choices[0].text == tokenizer.decode(whole, skip_special_tokens=True)
            chat = one.client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=4)
            assert chat.usage is not None
            assert 0 < chat.usage.completion_tokens <= 4
        assert checksums(bundle) == before  # nothing is written into the bundle
        assert read_shape(bundle).kv_token == read_export(bundle).cache_bytes


class TestText:
    @pytest.mark.parametrize("text", TEXTS)
    def test_greedy_text_is_that_of_the_runtime(
        self, server: Served, runtime: OnnxRuntime, tokenizer: PreTrainedTokenizerBase, text: str
    ) -> None:
        ids = tokenizer(text).input_ids
        answer = server.complete(prompt=text, max_tokens=24, temperature=0, return_token_ids=True)
        (choice,) = answer["choices"]
        expected = greedy(runtime, ids, 24)
        assert choice["prompt_token_ids"] == ids
        assert choice["token_ids"] == expected
        shown = expected[:-1] if expected[-1] == 1 else expected
        assert text + choice["text"] == tokenizer.decode([*ids, *shown], skip_special_tokens=True)
        assert choice["finish_reason"] == ("stop" if expected[-1] == 1 else "length")
        counts = {"prompt_tokens": len(ids), "completion_tokens": len(expected)}
        assert answer["usage"] == counts | {"total_tokens": sum(counts.values())}

    def test_log_probabilities_are_those_of_the_runtime(self, server: Served, runtime: OnnxRuntime) -> None:
        ids = [5, 9, 30, 31, 32, 40, 41, 100]
        answer = server.complete(
            prompt=ids, max_tokens=6, temperature=0, ignore_eos=True, echo=True, logprobs=3, prompt_logprobs=2,
            return_token_ids=True,
        )  # fmt: skip
        (choice,) = answer["choices"]
        whole = [*ids, *choice["token_ids"]]
        expected: Tensor = runtime.logprobs(torch.tensor([whole]))[0]
        chosen = expected[:-1].gather(1, torch.tensor(whole[1:])[:, None])[:, 0].tolist()
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:] == pytest.approx(chosen, abs=NEAR)
        for place, best in enumerate(found["top_logprobs"][1:]):
            top = expected[place].topk(3).values.tolist()
            assert sorted(best.values(), reverse=True)[:3] == pytest.approx(top, abs=NEAR)
        for place, by_id in enumerate(choice["prompt_logprobs"][1:], start=1):
            ranks = {int(number): one["rank"] for number, one in by_id.items()}
            order = expected[place - 1].argsort(descending=True).tolist()
            assert {number: order.index(number) + 1 for number in ranks} == ranks
            assert set(order[:2]) | {ids[place]} == set(ranks)
            assert by_id[str(ids[place])]["logprob"] == pytest.approx(chosen[place - 1], abs=NEAR)
        assert found["text_offset"][0] == 0
        assert len(found["tokens"]) == len(whole)

    def test_a_prompt_can_be_scored_without_a_text(self, server: Served, runtime: OnnxRuntime) -> None:
        answer = server.complete(prompt=[5, 9, 30], max_tokens=0, echo=True, logprobs=0)
        (choice,) = answer["choices"]
        expected = runtime.logprobs(torch.tensor([[5, 9, 30]]))[0]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
            [expected[0, 9].item(), expected[1, 30].item()], abs=NEAR
        )
        assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 0)

    def test_a_long_prompt_is_read_in_chunks(self, copied: Path, slow: Path) -> None:
        ids = [(7 * place) % 400 + 6 for place in range(600)]
        runtime = OnnxRuntime(slow, "float32")
        expected = runtime.logprobs(torch.tensor([ids]))[0, :-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        with serving(copied, slow) as server:
            answer = server.complete(prompt=ids, max_tokens=4, temperature=0, echo=True, logprobs=0, ignore_eos=True,
                                     return_token_ids=True)  # fmt: skip
        found = answer["choices"][0]
        assert found["logprobs"]["token_logprobs"][1:600] == pytest.approx(expected.tolist(), abs=NEAR)
        assert found["token_ids"] == runtime.generate_ids(torch.tensor([ids]), 4)[0, 600:].tolist()

    def test_a_batch_gives_the_texts_of_single_requests(self, server: Served) -> None:
        """Prompts of different lengths, also with the padding of other tokenizers (the id 2) and the end token."""
        prompts = [[5, 9, 30], [100, 8, 40, 41, 42, 43, 7, 9], [7], [2, 1, 2], [6, 2, 300, 2], [471, 5], [33] * 40]
        options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True, "logprobs": 2}
        options |= {"prompt_logprobs": 1}
        together = server.complete(prompt=prompts, **options)["choices"]
        for index, prompt in enumerate(prompts):
            (alone,) = server.complete(prompt=prompt, **options)["choices"]
            assert together[index]["index"] == index
            assert together[index]["token_ids"] == alone["token_ids"]
            assert together[index]["logprobs"]["token_logprobs"] == pytest.approx(
                alone["logprobs"]["token_logprobs"], abs=NEAR
            )
            pairs = zip(together[index]["prompt_logprobs"][1:], alone["prompt_logprobs"][1:], strict=True)
            assert all(one.keys() == other.keys() for one, other in pairs)
        assert server.metric("batch_rows_sum") > server.metric("batch_rows_count")

    def test_sixteen_at_once_get_the_texts_of_the_same_alone(self, server: Served) -> None:
        def ask(number: int) -> Any:
            text = f"{TEXTS[number % 4]} {number}"
            return server.client.completions.create(
                model="tiny", prompt=text, max_tokens=20, temperature=0.8, seed=number, logprobs=1
            )

        alone = [ask(number).choices[0].text for number in range(16)]
        with ThreadPoolExecutor(16) as pool:
            together = [answer.choices[0].text for answer in pool.map(ask, range(16))]
        assert together == alone
        assert len(set(alone)) > 12

    def test_sampling_follows_the_models_chances(self, server: Served, runtime: OnnxRuntime) -> None:
        chances = (runtime.logprobs(torch.tensor([[5, 9, 30]]))[0, -1] / 0.7).softmax(-1)
        likely = chances.argsort(descending=True)[:2].tolist()
        counts = dict.fromkeys(likely, 0)
        for seed in range(3):
            answer = server.complete(
                prompt=[5, 9, 30], max_tokens=1, temperature=0.7, n=128, seed=1000 * seed, return_token_ids=True
            )
            for choice in answer["choices"]:
                if choice["token_ids"][0] in counts:
                    counts[choice["token_ids"][0]] += 1
        for number in likely:
            chance = chances[number].item()
            assert counts[number] / 384 == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 384) ** 0.5)

    def test_the_same_seed_gives_the_same_text(self, server: Served) -> None:
        texts = [
            server.complete(prompt="Ada", max_tokens=24, temperature=1.5, seed=seed)["choices"][0]["text"]
            for seed in (1, 1, 2)
        ]
        assert texts[0] == texts[1] != texts[2]

    def test_settings_of_sampling(self, server: Served) -> None:
        options = {"prompt": [5, 9, 30], "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
        plain = server.complete(**options, temperature=0)["choices"][0]["token_ids"]
        for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
            assert server.complete(**options, temperature=2, **narrow)["choices"][0]["token_ids"] == plain
        first = plain[0]
        bias = {str(first): -100}
        assert first not in server.complete(**options, temperature=0, logit_bias=bias)["choices"][0]["token_ids"]
        forced = server.complete(**options, temperature=1, logit_bias={"77": 100})["choices"][0]["token_ids"]
        assert forced == [77] * 8
        options["max_tokens"] = 24
        repeated = server.complete(**options, temperature=0, logit_bias={"77": 5})["choices"][0]["token_ids"]
        penalized = server.complete(**options, temperature=0, logit_bias={"77": 5}, repetition_penalty=3.0,
                                    presence_penalty=2, frequency_penalty=2)["choices"][0]["token_ids"]  # fmt: skip
        assert len(set(penalized)) > len(set(repeated))


class TestEnds:
    def test_stop_strings_end_the_text_and_are_left_out(self, server: Served) -> None:
        options = {"prompt": "Ada", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        text = server.complete(**options)["choices"][0]["text"]
        stop = text[9:12]
        place = text.index(stop)
        (choice,) = server.complete(**options, stop=["never so", stop])["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text[:place], "stop", stop)
        (choice,) = server.complete(**options, stop=stop, include_stop_str_in_output=True)["choices"]
        assert choice["text"] == text[: place + len(stop)]
        stream = server.client.completions.create(
            model="tiny", prompt="Ada", max_tokens=24, temperature=0, stop=stop, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        pieces = [chunk.choices[0] for chunk in stream]
        assert "".join(piece.text for piece in pieces) == text[:place]
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]

    def test_stop_tokens_and_end_tokens(self, server: Served) -> None:
        options = {"prompt": [5, 9, 30], "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        ids = server.complete(**options, ignore_eos=True)["choices"][0]["token_ids"]
        stop = ids[4]
        (choice,) = server.complete(**options, ignore_eos=True, stop_token_ids=[stop])["choices"]
        assert choice["token_ids"] == ids[: ids.index(stop) + 1]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        bias = {"1": 100}
        (choice,) = server.complete(**options, logit_bias=bias)["choices"]
        assert (choice["token_ids"], choice["text"], choice["finish_reason"]) == ([1], "", "stop")
        assert choice["stop_reason"] is None
        (choice,) = server.complete(**options, logit_bias=bias, min_tokens=3)["choices"]
        assert len(choice["token_ids"]) == 4
        assert 1 not in choice["token_ids"][:3]
        (choice,) = server.complete(**options, logit_bias=bias, ignore_eos=True)["choices"]
        assert choice["token_ids"] == [1] * 12


class TestChat:
    def test_a_chat_is_answered_after_the_template(
        self, server: Served, runtime: OnnxRuntime, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        ids: Any = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        expected = greedy(runtime, ids, 16)
        answer = server.client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=16, temperature=0, logprobs=True, top_logprobs=2,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        (choice,) = answer.choices
        raw = answer.model_dump()
        assert raw["prompt_token_ids"] == ids
        assert raw["choices"][0]["token_ids"] == expected
        assert choice.message.content == tokenizer.decode(expected, skip_special_tokens=True)
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        logprobs = runtime.logprobs(torch.tensor([[*ids, *expected]]))[0, len(ids) - 1 : -1]
        assert [one.logprob for one in content] == pytest.approx(
            logprobs.gather(1, torch.tensor(expected)[:, None])[:, 0].tolist(), abs=NEAR
        )
        assert all(len(one.top_logprobs) == 2 for one in content)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids)

    def test_a_stream_is_the_same_text(self, server: Served) -> None:
        options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
        whole = server.client.chat.completions.create(**options, logprobs=True)
        chunks = list(
            server.client.chat.completions.create(
                **options, logprobs=True, stream=True, stream_options={"include_usage": True}
            )
        )
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
        assert choices[-1].finish_reason == whole.choices[0].finish_reason
        tokens = [one.token for choice in choices if choice.logprobs for one in choice.logprobs.content or []]
        assert whole.choices[0].logprobs is not None
        assert tokens == [one.token for one in whole.choices[0].logprobs.content or []]
        assert chunks[-1].usage == whole.usage
        assert len(choices) > 3

    def test_content_in_parts(self, server: Served) -> None:
        parts: list[Any] = [
            {"role": "user", "content": [{"type": "text", "text": "Ada"}, {"type": "text", "text": "sells"}]}
        ]
        assert (
            server.post("/tokenize", messages=parts).json()
            == server.post("/tokenize", messages=[{"role": "user", "content": "Ada\nsells"}]).json()
        )
        parts[0]["content"][1] = {"type": "image_url", "image_url": {"url": "data:,"}}
        refused = server.post("/v1/chat/completions", messages=parts)
        assert refused.status_code == 400
        assert "not text" in refused.json()["error"]["message"]

    def test_tools_are_refused_and_may_be_switched_off(self, server: Served) -> None:
        tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
        options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "tools": tools}
        with pytest.raises(openai.BadRequestError, match="chat template of tiny has no place for tools"):
            server.client.chat.completions.create(**options)
        assert server.client.chat.completions.create(**options, tool_choice="none").choices[0].message.content


class TestTokens:
    @pytest.mark.parametrize("generation", [True, False])
    def test_template_and_text_give_the_tokenizers_ids(
        self, server: Served, tokenizer: PreTrainedTokenizerBase, generation: bool
    ) -> None:
        found = server.post("/tokenize", messages=MESSAGES, add_generation_prompt=generation).json()
        expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=generation, return_dict=False)
        assert found["tokens"] == expected
        assert (found["count"], found["max_model_len"]) == (len(expected), CONTEXT)
        for text in (*TEXTS, "naïve 日本 \n\n x", "<|user|>Ada</s>"):
            ids = tokenizer(text).input_ids
            found = server.post("/tokenize", prompt=text, return_token_strs=True).json()
            assert found["tokens"] == ids
            assert len(found["token_strs"]) == len(ids)
            assert server.post("/detokenize", tokens=ids).json() == {"prompt": tokenizer.decode(ids)}

    def test_characters_of_several_tokens_arrive_whole(self, server: Served) -> None:
        ids = server.post("/tokenize", prompt="日本é").json()["tokens"]
        assert len(ids) > 3
        # one token after the other, forced by a stream of single-token requests' texts in one: bias cannot do it, so
        # the prompt is echoed and the pieces are those of a stream
        stream = server.client.completions.create(
            model="tiny", prompt=ids, max_tokens=30, temperature=0, stream=True, echo=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        pieces = [chunk.choices[0].text for chunk in stream]
        assert pieces[0].startswith("日本é")
        whole = server.complete(prompt=ids, max_tokens=30, temperature=0, ignore_eos=True, echo=True)
        assert "".join(pieces) == whole["choices"][0]["text"]


class TestRefused:
    def test_a_request_that_is_too_long_names_both_lengths(self, server: Served) -> None:
        with pytest.raises(
            openai.BadRequestError, match=r"context length is 256 tokens, but 300 were asked for \(10 of"
        ):
            server.client.completions.create(model="tiny", prompt=[7] * 10, max_tokens=290)
        refused = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "lamp " * 300}])
        assert refused.status_code == 400
        assert "shorten the prompt" in refused.json()["error"]["message"]

    def test_another_model(self, server: Served) -> None:
        with pytest.raises(openai.NotFoundError, match="'other' is not served here; this server has 'tiny'"):
            server.client.completions.create(model="other", prompt="Ada")
        assert server.http.get("/v1/models/other").status_code == 404
        assert server.post("/tokenize", model="other", prompt="a").status_code == 404

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ({"prompt": []}, "0 texts"),
            ({"prompt": [472]}, "token id 472; this model's are 0 to 471"),
            ({"prompt": [[5], [-1]]}, "token id -1"),
            ({"prompt": "Ada", "temperature": -1}, "temperature"),
            ({"prompt": "Ada", "n": 129}, "n:"),
            ({"prompt": ["a"] * 65, "n": 2}, "130 texts"),
            ({"prompt": "Ada", "logprobs": 21}, "logprobs"),
            ({"prompt": "Ada", "max_tokens": 0}, "max_tokens is 0"),
            ({"prompt": "Ada", "stop": ["a", ""]}, "stop must be"),
            ({"prompt": "Ada", "best_of": 2}, "does not support best_of"),
            ({"prompt": "Ada", "response_format": {"type": "json_object"}}, "does not support response_format"),
            ({"prompt": "Ada", "stream": True, "prompt_logprobs": 1}, "not streamed"),
            ({"prompt": "Ada", "logit_bias": {"9999": 1}}, "logit_bias holds the token id 9999"),
            ({"prompt": ""}, "prompt is empty"),
            ({}, "prompt: Field required"),
        ],
    )
    def test_what_is_wrong_is_named(self, server: Served, body: dict[str, Any], said: str) -> None:
        answer = server.post("/v1/completions", **body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError")
        assert said in error["message"]

    def test_json_paths_and_bodies(self, server: Served) -> None:
        broken = server.http.post(
            "/v1/completions", content=b'{"prompt": ', headers={"content-type": "application/json"}
        )
        half = b'{"prompt": "a \\ud83d b", "max_tokens": 1}'
        lone = server.http.post("/v1/completions", content=half, headers={"content-type": "application/json"})
        assert (broken.status_code, lone.status_code) == (400, 400)
        assert server.http.get("/none").json()["error"]["code"] == 404
        assert server.post("/v1/completions", prompt="a" * 70_000).status_code == 413

        def parts() -> Iterator[bytes]:
            for _ in range(10):
                yield b"x" * 10_000

        with contextlib.suppress(httpx.WriteError):  # the connection was closed while the rest was being sent
            assert server.http.post("/v1/completions", content=parts()).status_code == 413
        assert server.http.get("/health").status_code == 200


class TestDescription:
    def test_models_version_and_health(self, server: Served) -> None:
        (card,) = server.client.models.list().data
        assert (card.id, card.model_dump()["max_model_len"]) == ("tiny", CONTEXT)
        assert server.client.models.retrieve("tiny").id == "tiny"
        assert server.http.get("/version").json()["version"]
        assert server.http.get("/health").status_code == 200

    def test_metrics_count(self, server: Served) -> None:
        names = ("prompt_tokens_total", "generation_tokens_total", "request_seconds_count",
                 "time_to_first_token_seconds_count", "time_between_tokens_seconds_count")  # fmt: skip
        before = [server.metric(name) for name in names]
        server.complete(prompt=[5, 9, 30], max_tokens=7, temperature=0, ignore_eos=True)
        after = [server.metric(name) for name in names]
        assert [b - a for a, b in zip(before, after, strict=True)] == [3, 7, 1, 1, 6]
        assert server.metric("requests_running") == 0
        text = server.http.get("/metrics").text
        assert 'onnx_server_responses_total{path="/v1/completions",status="200"}' in text
        assert "process_resident_memory_bytes" in text


class TestLife:
    """With texts of thousands of tokens, so that a request can be seen while it runs."""

    TEXT: dict[str, Any] = {"prompt": "Ada", "max_tokens": 8000, "temperature": 0, "ignore_eos": True}  # noqa: RUF012

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_is_gone_stops_the_generation(self, copied: Path, slow: Path, stream: bool) -> None:
        with serving(copied, slow) as server:
            try:
                with httpx.stream(
                    "POST", f"{server.url}/v1/completions", json={**self.TEXT, "stream": stream}, timeout=0.5,
                    trust_env=False,
                ) as response:  # fmt: skip
                    assert stream
                    lines = response.iter_lines()
                    next(lines)
                    server.wait("requests_running", 1)
            except httpx.ReadTimeout:
                assert not stream
            server.wait("requests_running", 0, seconds=2)
            assert server.metric("generation_tokens_total") < 7000
            assert server.complete(prompt="Ada", max_tokens=2)["choices"][0]["text"]

    def test_a_full_queue_is_said_and_a_place_becomes_free(self, copied: Path, slow: Path) -> None:
        with serving(copied, slow, "--max-queue", "1", "--max-batch", "1") as server, ThreadPoolExecutor(2) as pool:
            running = pool.submit(server.post, "/v1/completions", **self.TEXT)
            server.wait("requests_running", 1)
            waiting = pool.submit(server.post, "/v1/completions", prompt="Ben", max_tokens=1)
            server.wait("requests_waiting", 1)
            refused = server.post("/v1/completions", prompt="Cleo", max_tokens=1)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "1 requests are waiting" in refused.json()["error"]["message"]
            assert waiting.result().status_code == running.result().status_code == 200
            assert server.post("/v1/completions", prompt="Cleo", max_tokens=1).status_code == 200

    def test_sigterm_lets_running_requests_end_and_refuses_new_ones(self, copied: Path, slow: Path) -> None:
        with serving(copied, slow) as server, ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.post, "/v1/completions", **self.TEXT)
            server.wait("requests_running", 1)
            server.process.send_signal(signal.SIGTERM)
            until = time.monotonic() + 5
            while (refused := server.http.get("/health")).status_code != 503:
                assert time.monotonic() < until
            assert "shutting down" in refused.json()["error"]["message"]
            assert running.result().json()["usage"]["completion_tokens"] == 8000
            assert server.process.wait(timeout=10) == 0

    def test_sigterm_ends_within_the_limit(self, copied: Path, slow: Path) -> None:
        with serving(copied, slow, "--drain-seconds", "0.3") as server:
            seen: list[Any] = []

            def stream() -> None:
                with httpx.stream(
                    "POST", f"{server.url}/v1/completions", json={**self.TEXT, "stream": True}, timeout=60,
                    trust_env=False,
                ) as response:  # fmt: skip
                    seen.extend(line for line in response.iter_lines() if line)

            thread = threading.Thread(target=stream)
            thread.start()
            server.wait("requests_running", 1)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=10) == 0
            assert time.monotonic() - began < 3
            thread.join()
            assert json.loads(seen[-2].removeprefix("data: "))["error"]["code"] == 503
            assert seen[-1] == "data: [DONE]"

    def test_the_server_ends_when_its_engine_is_killed(self, copied: Path, slow: Path) -> None:
        """A request that runs ends with an error, and who started the server can start it again."""
        with serving(copied, slow) as server, ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.post, "/v1/completions", **self.TEXT)
            server.wait("requests_running", 1)
            (engine,) = psutil.Process(server.process.pid).children()
            engine.kill()
            answer = running.result()
            assert answer.status_code == 500
            assert "has ended by SIGKILL; it may have run out of memory" in answer.json()["error"]["message"]
            assert server.process.wait(timeout=10) == 1

    def test_the_engine_ends_with_the_server(self, copied: Path, slow: Path) -> None:
        with serving(copied, slow) as server:
            (engine,) = psutil.Process(server.process.pid).children()
            server.process.kill()
            engine.wait(timeout=10)

    @pytest.mark.parametrize("way", ["file", "variable"])
    def test_a_key_guards_every_path_but_health(self, copied: Path, model: Path, tmp_path: Path, way: str) -> None:
        (tmp_path / "keys").write_text("# two\nfirst\nsecond\n")
        arguments = ["--api-key-file", str(tmp_path / "keys")] if way == "file" else []
        environment = {"ONNX_SERVER_API_KEY": "second"} if way == "variable" else {}
        with serving(copied, model, *arguments, key="second", **environment) as server:
            for path in ("/v1/models", "/metrics", "/version", "/tokenize", "/none", "/v1/completions"):
                assert server.http.get(path).status_code == 401
                wrong = server.http.get(path, headers={"Authorization": "Bearer second2"})
                assert wrong.status_code == 401
                assert wrong.json()["error"]["type"] == "AuthenticationError"
            assert server.http.get("/health").status_code == 200
            assert server.client.models.list().data[0].id == "tiny"

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["{none}"], "holds no ONNX Runtime GenAI model"),
            (["{model}", "--max-model-len", "300"], "--max-model-len is 300, but the model's context is 256"),
            (["{model}", "--kv-cache-gib", "0.00001"], "the KV cache of 256 tokens needs"),
            (["{model}", "--api-key-file", "{none}/keys"], "cannot read the API keys"),
            (["{model}", "--api-key-file", "{empty}"], "holds no API key"),
            (["{broken}"], "the chat template is not valid"),
        ],
    )
    def test_a_server_that_cannot_start_says_why_in_one_line(
        self, copied: Path, model: Path, tmp_path: Path, arguments: list[str], said: str
    ) -> None:
        (tmp_path / "none").mkdir()
        (tmp_path / "empty").write_text("# none\n\n")
        shutil.copytree(model, tmp_path / "broken")
        (tmp_path / "broken/chat_template.jinja").write_text("{% if %}")
        places = {"none": tmp_path / "none", "empty": tmp_path / "empty", "broken": tmp_path / "broken", "model": model}
        command = [sys.executable, "-m", "onnx_server", *(one.format(**places) for one in arguments)]
        environment = {**os.environ, "PYTHONPATH": str(copied)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=copied)
        assert done.returncode == 1
        assert said in done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
