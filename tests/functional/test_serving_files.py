"""The files of serve/ run for real, as processes of vLLM's CPU build: one process, and several machines.

Marked slow: each server takes a minute or more to start.
MODELPRESS_VLLM_PYTHON: the Python of an environment with vLLM's CPU build (docs/deploying.md).
MODELPRESS_SERVED_MODEL: a folder with a model to serve instead of a tiny one, such as exports/gptq-int4.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.deployment.write import write_serving
from tasks.output import link_or_copy
from tasks.settings import check_settings
from tests.serving_files import PYTHON, Service, of_compose, of_group
from tests.tiny import tiny_model
from tests.unit.test_sizing import LARGE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="MODELPRESS_VLLM_PYTHON names no interpreter"),
]
NAME = "smollm2-135m-instruct"
START = float(os.environ.get("MODELPRESS_START_SECONDS", "300"))  # a start takes minutes on a busy machine
# nats between the two best tokens at which rounding may decide: the sums of several processes are rounded in another
# order, in bfloat16
TIE = 0.25
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was",
    "Water boils at",
    "def add(a, b):",
    "The three primary colors are",
    "My favourite season is",
)
LONG = {"prompt": "Count: 1 2 3 4", "temperature": 0, "ignore_eos": True}
# on a CPU, vLLM cannot spread layers over machines, but it can split them
SPLIT = ("--pipeline-parallel-size=1", "--tensor-parallel-size=3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("MODELPRESS_SERVED_MODEL"):
        return Path(given)
    return tiny_model(tmp_path_factory.mktemp("served") / "model", heads=9, kv_heads=3, hidden=576, layers=4, steps=60)


@pytest.fixture(scope="module")
def bundles(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model with serve/ for three kinds of hardware; for the last one as if it were a large model."""
    kinds: dict[str, dict[str, Any] | None] = {
        "one": None,
        "copies": {"memory": 24, "machines": 2},
        "group": {"gpu": "NVIDIA-H100", "memory": 24, "machines": 3},
    }
    made = {}
    for kind, hardware in kinds.items():
        made[kind] = tmp_path_factory.mktemp(kind) / "bundle"
        for file in model.iterdir():
            link_or_copy(file, made[kind] / file.name)
        params = yaml.safe_load(Path("params.yaml").read_text())
        params["package"]["hardware"] = hardware
        with pytest.MonkeyPatch.context() as patch:
            if kind == "group":
                patch.setattr("tasks.deployment.write.read_shape", lambda _: LARGE)
            write_serving(made[kind], check_settings(params), "vllm", "gptq-int4")
    return made


@dataclass(frozen=True)
class Text:
    """A greedy text: its tokens, and the gap in nats between the two best ones at each place."""

    tokens: list[str]
    gaps: list[float]


def greedy(service: Service, prompt: str) -> Text:
    body = {"model": NAME, "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 2}
    found = service.ask("/v1/completions", body)["choices"][0]["logprobs"]
    best = [sorted(place.values(), reverse=True) for place in found["top_logprobs"]]
    return Text(found["tokens"], [values[0] - values[1] if len(values) > 1 else 99.0 for values in best])


def parted(one: Text, other: Text) -> tuple[int, float] | None:
    """Where two texts part, and the gap there; None if they are equal."""
    for place, (ours, theirs) in enumerate(zip(one.tokens, other.tokens, strict=False)):
        if ours != theirs:
            return place, min(one.gaps[place], other.gaps[place])
    return None


@pytest.fixture(scope="module")
def alone(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Text]:
    """The greedy texts of the one process in compose.yaml, after a kill under load."""
    with Service(of_compose(bundles["one"]), bundles["one"], tmp_path_factory.mktemp("compose")) as service:
        report("one process started", service.wait(START))
        texts = [greedy(service, prompt) for prompt in PROMPTS]
        survives(service, 0)
        assert [text.tokens for text in texts] == [greedy(service, prompt).tokens for prompt in PROMPTS]
    return texts


def test_one_process(alone: list[Text]) -> None:
    assert all(len(text.tokens) > 4 for text in alone)


def test_tensor_parallel_over_three_machines(bundles: dict[str, Path], alone: list[Text], tmp_path: Path) -> None:
    containers = of_group(bundles["group"])
    assert len(containers) == 3
    with Service(containers, bundles["group"], tmp_path, SPLIT) as service:
        report("three machines started", service.wait(START))
        compare(service, alone)
        survives(service, 2)
        ends_in_order(service, first=1, tokens=50)


def test_data_parallel_over_two_machines(bundles: dict[str, Path], alone: list[Text], tmp_path: Path) -> None:
    containers = of_group(bundles["copies"])
    assert len(containers) == 2
    with Service(containers, bundles["copies"], tmp_path) as service:
        report("two machines started", service.wait(START))
        compare(service, alone)
        assert min(finished(service).values()) > 0  # both machines answered
        survives(service, 1)
        survives(service, 1, cut=True)
        ends_in_order(service, first=1, tokens=200)


def compare(service: Service, alone: list[Text]) -> None:
    """The texts equal those of one process, or part at a near-tie."""
    places = [parted(one, greedy(service, prompt)) for one, prompt in zip(alone, PROMPTS, strict=True)]
    report("parted from one process at (place, nats)", places)
    assert all(place is None or place[1] < TIE for place in places)


def finished(service: Service) -> dict[str, float]:
    """The requests that each engine answered."""
    with service.open("/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("vllm:request_success_total{"):
            engine = line.partition('engine="')[2].partition('"')[0]
            found[engine] = found.get(engine, 0) + float(line.rpartition(" ")[2])
    return found


@dataclass
class Request:
    """A streamed request in a thread. ended: when; error: why, None if it was answered to its end."""

    service: Service
    tokens: int = 400
    events: int = 0
    ended: float | None = None
    error: str | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            for _ in self.service.stream("/v1/completions", {"model": NAME, **LONG, "max_tokens": self.tokens}):
                self.events += 1
        except Exception as error:  # every kind of failure counts
            self.error = f"{type(error).__name__}: {error}"
        self.ended = time.monotonic()


def running(service: Service, tokens: int = 400) -> list[Request]:
    """Requests that are being answered. tokens: of each."""
    requests = [Request(service, tokens) for _ in range(4)]
    deadline = time.monotonic() + 60
    while any(request.events < 3 for request in requests) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(request.events >= 3 and request.ended is None for request in requests), requests
    return requests


def survives(service: Service, rank: int, cut: bool = False) -> None:
    """Lose a machine under load: requests in flight end with an error within 10 s, the next succeeds within 180 s, and
    all other machines end by themselves. cut: its network instead of its processes."""
    starts, requests = service.starts, running(service)
    lost = time.monotonic()
    (service.cut if cut else service.lose)(rank)
    for request in requests:
        request.thread.join(max(0.0, lost + 10 - time.monotonic()))
    report("requests in flight ended after", [request.ended and round(request.ended - lost, 2) for request in requests])
    report("their errors", {request.error for request in requests})
    assert all(request.ended and request.error for request in requests), service.logs()
    answer = None
    while answer is None and time.monotonic() < lost + 180:
        try:
            answer = greedy(service, PROMPTS[0])
        except OSError:
            time.sleep(1)
    report("the next was answered after", time.monotonic() - lost)
    assert answer is not None, service.logs()
    assert (service.starts, service.stayed) == (starts + 1, [rank] if cut else [])


def ends_in_order(service: Service, first: int, tokens: int) -> None:
    """Tell the machines to end, this one first: running requests are answered, and all machines end.

    tokens: of each request, which must take less time than vLLM gets.
    """
    requests = running(service, tokens)
    ranks = sorted(range(len(service.containers)), key=lambda rank: rank != first)
    start = time.monotonic()
    statuses = service.end_in_order(ranks, 90)
    report("all machines ended after", time.monotonic() - start)
    for request in requests:
        request.thread.join(1)
    assert [request.error for request in requests] == [None] * 4, service.logs()
    assert statuses == [0] * len(ranks), service.logs()


def report(what: str, value: object) -> None:
    """Print a figure; shown with pytest -s."""
    print(f"\n{what}: {value if not isinstance(value, float) else round(value, 1)}", flush=True)
