"""The servers of the targets, one small class each, and how one of them is started and tried."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import httpx

from tasks.deployment.tool_calling import read_template
from tasks.engine_process import PATH
from tasks.environments import clean, interpreter, locked, nvidia_gpu, version_of
from tasks.errors import TaskError
from tasks.formats.gguf.file import NAME as GGUF
from tasks.serving.llama_server import Serving, llama_server, server_arguments, source_version
from tasks.serving.near_ties import INTEGER_KERNELS, computed_in
from tasks.serving.onnx_server.options import KEY_VARIABLE
from tasks.serving.process import Launch, NotServableHere, NotServed, Server, free_port, running

FIRST = 600.0  # seconds for the first answer: kernels may be compiled for it
ENDING = 10.0  # seconds in which a server whose engine broke ends


class Engine(Protocol):
    """A kind of server.

    name: for reports. health: the path that answers 200 when it is ready. running: the metric (Prometheus) that counts
    requests in work; None if it has none. offers: what it has beyond models, completions and chat, of FEATURES.
    """

    name: str
    health: str
    running: str | None
    offers: frozenset[str]

    def version(self) -> str:
        """Its version. TaskError if it is not there and cannot be installed."""

    def program(self) -> list[str]:
        """The command without arguments, an absolute path first. Installs it where needed; TaskError if it cannot."""

    def arguments(self, folder: Path, name: str, dtype: str, context: int | None) -> list[str]:
        """The arguments to serve the model in `folder` as `name`, without host and port (`--host`, `--port`)."""

    def environment(self, folder: Path, context: int | None) -> dict[str, str]:
        """All environment variables of the process."""

    def computes_in(self, folder: Path, dtype: str) -> str:
        """What it computes in, as in near_ties.py: a dtype, or "rounded activations"."""

    def not_here(self, folder: Path, words: str) -> str | None:
        """Why this machine cannot serve a model that another could, by the server's last words; None: it is no such."""


# tokenize: POST /tokenize. token ids: `return_token_ids`, `return_tokens_as_token_ids`. echo: log-probabilities of the
# prompt, by `echo`. stop tokens: `stop_token_ids`. logprobs: of the answer, by `logprobs`
FEATURES = frozenset({"tokenize", "token ids", "echo", "stop tokens", "logprobs"})
# beside them: a request with tools is answered without a parser for the calls
ANY_TOOLS = "any tools"


class Vllm:
    """vLLM: https://docs.vllm.ai"""

    name = "vLLM"
    health = "/health"
    running: str | None = "vllm:num_requests_running"
    offers = FEATURES

    def version(self) -> str:
        """Its version in its environment."""
        return version_of(self._environment(), self._environment())

    def program(self) -> list[str]:
        """The module, because the command `vllm` of the CPU build looks for a package named vllm and fails."""
        return [str(interpreter(self._environment())), "-m", "vllm.entrypoints.openai.api_server"]

    def arguments(self, folder: Path, name: str, dtype: str, context: int | None) -> list[str]:
        """On a CPU without compilation, which takes minutes. With tools where a parser reads the template's calls."""
        parser = read_template(folder).parser
        return [
            *("--model", str(folder), "--served-model-name", name, "--dtype", dtype),
            *(("--max-model-len", str(context)) if context else ()),
            *(() if nvidia_gpu() else ("--enforce-eager",)),
            *(("--enable-auto-tool-choice", "--tool-call-parser", parser) if parser else ()),
        ]

    def environment(self, folder: Path, context: int | None) -> dict[str, str]:
        """No telemetry, no network, no key; on a CPU room in the KV cache for a few texts of full length."""
        own = {key: value for key, value in clean().items() if key != "VLLM_API_KEY"}  # it would refuse our requests
        own |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if not nvidia_gpu():
            own.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the default wants more cores than there may be
            own.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_cache_gib(folder, context)))
            own.setdefault("VLLM_CPU_INT4_W4A8", "0")  # with AMX it would round activations, which were not when scored
        return own

    def computes_in(self, folder: Path, dtype: str) -> str:
        """The model's dtype, if none is asked for."""
        return computed_in(folder, dtype)

    def not_here(self, folder: Path, words: str) -> str | None:
        """Kernels that vLLM's CPU build has for some processors only."""
        if nvidia_gpu():
            return None
        if "cpu_gemm_wna16" in words:
            return "vLLM multiplies 4-bit weights only on processors with AVX-512, which this one has not"
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = json.dumps(stored.get("quantization_config") or {}).lower()
        if "fp8" in text or '"type": "float"' in text:
            return f"vLLM does not serve this model's FP8 weights on this processor ({words})"
        if any(key in json.dumps(stored) for key in _EXPERTS) and (
            "experts" in words.lower() or "moe" in words.lower()
        ):
            return f"vLLM serves mixtures of experts in this format only on processors with AMX ({words})"
        return None

    @staticmethod
    def _environment() -> str:
        return "vllm" if nvidia_gpu() else "vllm-cpu"


class OnnxServer:
    """ONNX Runtime GenAI behind tasks/serving/onnx_server."""

    name = "ONNX Runtime GenAI"
    health = "/health"
    running: str | None = "onnx_server_requests_running"
    offers = FEATURES | {ANY_TOOLS}

    def version(self) -> str:
        """That of onnxruntime-genai."""
        return locked("onnx")["onnxruntime-genai"]

    def program(self) -> list[str]:
        """The server's package, in its environment."""
        return [str(interpreter("onnx")), "-P", "-m", "tasks.serving.onnx_server"]

    def arguments(self, folder: Path, name: str, dtype: str, context: int | None) -> list[str]:
        """`dtype` has no effect: the exported graph decides."""
        longest = ("--max-model-len", str(context)) if context else ()
        return [str(folder), "--served-model-name", name, *longest]

    def environment(self, folder: Path, context: int | None) -> dict[str, str]:
        """Without keys, and with this project on the path."""
        own = {key: value for key, value in clean().items() if key != KEY_VARIABLE}
        return own | {"PYTHONPATH": PATH, "ORT_DISABLE_TELEMETRY": "1"}

    def computes_in(self, folder: Path, dtype: str) -> str:
        """Its integer kernels round activations; a graph without integer weights computes in float32."""
        graph = (folder / "model.onnx").read_bytes()  # without weights, which are in a file of their own
        return INTEGER_KERNELS if b"MatMulNBits" in graph else "float32"

    def not_here(self, folder: Path, words: str) -> str | None:
        """Never: its kernels run on any CPU."""
        return None


class LlamaCpp:
    """llama.cpp's own server: https://github.com/ggml-org/llama.cpp"""

    name = "llama.cpp"
    health = "/health"
    running: str | None = "llamacpp:requests_processing"
    offers = frozenset({"logprobs", ANY_TOOLS})

    def version(self) -> str:
        """That of llama-cpp-python, whose source holds the server."""
        return source_version()

    def program(self) -> list[str]:
        """The compiled server."""
        return [str(llama_server())]

    def arguments(self, folder: Path, name: str, dtype: str, context: int | None) -> list[str]:
        """`dtype` has no effect: the file's types decide."""
        return server_arguments(folder / GGUF, Serving(name=name, context=context))

    def environment(self, folder: Path, context: int | None) -> dict[str, str]:
        """As of this process."""
        return dict(os.environ)

    def computes_in(self, folder: Path, dtype: str) -> str:
        """Its integer kernels round activations; without integer weights it is the file's own dtype."""
        import gguf

        types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / GGUF).tensors}
        if types - {"F32", "F16", "BF16"}:
            return "rounded activations"
        return "bfloat16" if "BF16" in types else "float16" if "F16" in types else "float32"

    def not_here(self, folder: Path, words: str) -> str | None:
        """Never: it is compiled for this machine."""
        return None


_EXPERTS = ('"num_local_experts"', '"num_experts"', '"n_routed_experts"', '"moe_num_experts"')
TEXTS = 4  # of full length that vLLM's KV cache holds at once on a CPU


def _cache_gib(folder: Path, context: int | None) -> int:
    """GiB of KV cache, at least 1."""
    from tasks.deployment.shape import read_shape  # imports Transformers, which takes seconds

    shape = read_shape(folder)
    length = context or shape.context or 0
    return max(1, math.ceil(TEXTS * (shape.kv_token * length + shape.kv_sequence) / 2**30))


ENGINES: dict[str, Callable[[], Engine]] = {"vllm": Vllm, "onnx": OnnxServer, "gguf": LlamaCpp}  # by target


def engine_of(target: str) -> Engine:
    """The engine of a target; TaskError if it has no server."""
    if target not in ENGINES:
        raise TaskError(f"the target {target!r} has no server; there are servers for: {', '.join(sorted(ENGINES))}")
    return ENGINES[target]()


@contextmanager
def served(
    target: str,
    folder: Path,
    name: str,
    dtype: str,
    log: Path,
    *,
    context: int | None = None,
    extra: Sequence[str] = (),
) -> Iterator[Server]:
    """Serve the model in `folder` under `name` with the target's engine, on a free port of 127.0.0.1.

    dtype: of computation, "auto" for the model's own. log: takes the server's output. context: tokens of prompt and
    answer together; None: the model's own. extra: further arguments of the server.
    It has answered a request when this yields. Raises NotServed if it does not start or answer, NotServableHere if
    this machine lacks what the model needs, TaskError if the engine cannot be installed. It is stopped at the end.
    """
    engine = engine_of(target)
    folder, port = folder.resolve(), free_port()
    program, arguments = engine.program(), engine.arguments(folder, name, dtype, context)
    launch = Launch(
        engine=engine.name,
        version=engine.version(),
        name=name,
        port=port,
        command=[*program, *arguments, "--host", "127.0.0.1", "--port", str(port), *extra],
        shown=[Path(program[0]).name, *program[1:], *(part.replace(str(folder), name) for part in arguments), *extra],
        environment=engine.environment(folder, context),
        health=engine.health,
    )
    with running(launch, log) as server:
        try:
            server.wait_until_ready()
            _answers(server)
        except NotServed as error:
            reason = engine.not_here(folder, error.last_words)
            if reason:
                raise NotServableHere(reason) from error
            raise
        yield server


def _answers(server: Server) -> None:
    """NotServed unless the server answers a first request: some kernels are missing only when they are used."""
    body = {"model": server.name, "prompt": "The", "max_tokens": 1}
    try:
        with httpx.Client(trust_env=False, timeout=FIRST) as client:
            response = client.post(f"{server.url}/v1/completions", json=body)
        problem = None if response.is_success else f"{response.status_code}: {response.text[:200]}"
    except httpx.HTTPError as error:
        problem = f"{type(error).__name__}"
    if problem:
        server.ends_within(ENDING)
        raise NotServed(f"{server.engine} started, but its first answer was {problem}", server.last_words())
