"""The load test: figures by hand, order of the trial, and servers that are faster, fail or end."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.errors import TaskError
from tasks.loadtest.driver import usage_apart
from tasks.loadtest.figures import cost, figures, level, percentiles, ratio, ratios
from tasks.loadtest.generator import Generator, generator, read_reply
from tasks.loadtest.records import Request, Run
from tasks.loadtest.trial import run_trial, saturation
from tasks.settings import LoadSettings, ObjectiveSettings
from tests.load_server import TimedServer, answering
from tests.tiny import tiny_tokenizer

DRIVER = Path(__file__).resolve().parents[1] / "load_driver.py"
OBJECTIVE = ObjectiveSettings(ttft=0.5, tpot=0.1)
SETTINGS = LoadSettings(
    prompt_tokens=8, new_tokens=11, pairs=5, requests=4, concurrency=4, limit=1, objective=OBJECTIVE, price=None
)
# random factors of the times, by seeds whose medians and maxima of each run are the same on average: the noise is known
UNEVEN: tuple[dict[str, Any], ...] = ({"spread": 0.12, "seed": 32}, {"spread": 0.12, "seed": 5})
OWN_VLLM = os.environ.get("MODELPRESS_VLLM_PYTHON")


def request(first: float = 0.1, each: float = 0.02, tokens: int = 6) -> Request:
    gaps = (each,) * (tokens - 1)
    return Request(first, gaps, first + sum(gaps), 8, tokens)


def run(speed: float = 100.0, concurrency: int = 1, requests: int = 10, failures: tuple[str, ...] = ()) -> Run:
    """A run with this many new tokens per second."""
    found = tuple(request() for _ in range(requests))
    return Run(concurrency, 6 * requests / speed, found, failures, 0.25, 0.75)


def reply(**changes: Any) -> dict[str, Any]:
    """The benchmark's result for two requests."""
    whole = {
        "duration": 2.0,
        "cpu_seconds": 0.1,
        "ttfts": [0.5, 0.25],
        "itls": [[0.25, 0.25], [0.25, 0.5]],
        "latencies": [1.0, 1.0],
        "input_lens": [8, 9],
        "output_lens": [3, 3],
        "errors": ["", ""],
        "request_goodput": None,
    }
    return whole | changes


# figures, by hand


def test_percentiles() -> None:
    found = percentiles([float(value) for value in range(1, 102)], many=False)  # 1 to 101
    assert (found.p50, found.p95, found.p99) == (51.0, 96.0, None)
    assert percentiles([float(value) for value in range(1, 102)], many=True).p99 == 100.0
    assert percentiles([1.0, 2.0], many=False).p95 == 1.95


def test_p99_needs_a_thousand_requests() -> None:
    few, many = (level([run(requests=count)], OBJECTIVE) for count in (999, 1000))
    assert few.latency.p99 is None
    assert many.latency.p99 == 0.2


def test_level() -> None:
    slow, late = request(first=0.6), request(each=0.15)  # each misses one half of the objective
    runs = [
        Run(4, 1.0, (request(), request(), slow), ("broken",), 1.0, 2.0),
        Run(4, 3.0, (request(), late), (), 1.0, 4.0),
    ]
    found = level(runs, OBJECTIVE)
    assert (found.concurrency, found.requests, found.failed) == (4, 5, 1)
    assert found.tokens_per_second == 30 / 4
    assert found.requests_per_second == 5 / 4
    assert found.goodput == 3 / 4
    assert found.time_to_first_token.p50 == 0.1
    assert found.time_per_token.p50 == 0.02
    assert found.time_per_token.p95 == pytest.approx(0.02 + 0.8 * 0.13)
    assert found.latency.p50 == 0.2
    assert found.gap.p95 == 0.15  # 5 of 25 gaps are long
    assert (found.generator_cpu_seconds, found.server_cpu_seconds, found.generator_share) == (2.0, 6.0, 0.25)


def test_cost() -> None:
    levels = [level([run(speed, requests=10)], OBJECTIVE) for speed in (50.0, 200.0)]
    found = cost(levels, 3.6, 6)  # 0.001 a second
    assert found is not None
    assert found.lowest == 5.0  # a million tokens take 5,000 s
    assert found.within_objective == pytest.approx(5.0, rel=1e-4)
    none_meets = [dataclasses.replace(one, goodput=0.0) for one in levels]
    assert (missed := cost(none_meets, 3.6, 6)) is not None
    assert missed.within_objective is None
    assert cost(levels, None, 6) is None


def test_saturation_is_where_doubling_adds_too_little() -> None:
    curve = tuple(run(speed, 2**step) for step, speed in enumerate((10.0, 19.0, 30.0, 31.0, 60.0)))
    assert saturation(curve) == 4
    assert saturation(curve[:3]) is None
    assert saturation(()) is None
    exact = tuple(run(speed, 2**step) for step, speed in enumerate((100.0, 105.0)))
    assert saturation(exact) == 1


def test_the_interval_contains_a_known_effect() -> None:
    """Over 5 pairs about 92 of 100 intervals contain the ratio, and not 95, because no bootstrap interval is wider than
    its few values."""
    random = np.random.default_rng(0)
    found = [ratio(list(1.3 * np.exp(0.1 * random.standard_normal(5)))) for _ in range(300)]
    assert 0.89 <= sum(one.low <= 1.3 <= one.high for one in found) / 300 <= 0.97
    for one in found:
        assert one.low <= one.mean <= one.high
        assert one.tie == (one.low <= 1 <= one.high)


def test_a_ratio_of_pairs_is_free_of_the_machines_drift() -> None:
    drift = (1.0, 3.0, 0.4, 2.0, 1.5)
    found = ratios([(run(150 * by), run(100 * by)) for by in drift])
    assert found["tokens_per_second"].mean == pytest.approx(1.5)
    assert found["tokens_per_second"].low == found["tokens_per_second"].high == pytest.approx(1.5)
    assert not found["tokens_per_second"].tie
    assert found["latency"].tie  # the requests of `run` are equal


def test_the_same_pairs_give_the_same_interval() -> None:
    values = [1.1, 1.2, 0.9, 1.05, 1.3]
    assert ratio(values) == ratio(values)
    assert ratio([1 / value for value in values]).mean == pytest.approx(1 / ratio(values).mean, rel=1e-4)


# the trial's order, with runs that are computed


class Counted:
    """Servers whose throughput is a function of the concurrency; `asked` has the calls."""

    def __init__(self, speeds: dict[str, list[float]]) -> None:
        self.speeds, self.asked = speeds, list[tuple[str, int, int, int]]()

    def __call__(self, server: Any, concurrency: int, requests: int, seed: int) -> Run:
        self.asked.append((server.name, concurrency, requests, seed))
        return run(self.speeds[server.name][concurrency.bit_length() - 1], concurrency, requests)


def settings(**changes: Any) -> LoadSettings:
    return SETTINGS.model_copy(update=changes)


def test_pairs_alternate_and_the_concurrency_rises_until_it_brings_too_little() -> None:
    variant, baseline = TimedServer("int8"), TimedServer("base")
    ask = Counted({"int8": [10, 19, 36, 36.5, 80], "base": [10, 10.2, 99, 99, 99]})
    trial = run_trial(ask, (variant, baseline), settings(limit=16, concurrency=2, requests=3))
    names = [name for name, *_ in ask.asked]
    assert names[:2] == ["int8", "base"]  # warm-up
    assert names[2:12] == ["int8", "base", "base", "int8"] * 2 + ["int8", "base"]
    assert all(requests == 4 for _, _, requests, _ in ask.asked[2:12])  # whole rounds of 2
    assert [one.concurrency for one in trial.curve] == [1, 2, 4, 8]
    assert [one.concurrency for one in trial.baseline_curve] == [1, 2]
    assert all(len(pair) == 2 for pair in trial.pairs)
    found = figures(trial, settings(), "generator 1")
    assert (found.saturation, found.baseline_saturation) == (4, 1)
    assert found.ratios is not None
    assert found.ratios["tokens_per_second"].mean == pytest.approx(19 / 10.2, rel=1e-4)
    seeds = [(name, seed) for name, *_, seed in ask.asked]
    assert len(set(seeds)) == len(seeds)  # no server sees a prompt twice
    pairs = [seed for *_, seed in ask.asked[2:12]]
    assert pairs[::2] == pairs[1::2]  # both of a pair see the same prompts


def test_a_slow_moment_does_not_end_the_curve() -> None:
    class Hiccup(Counted):
        def __call__(self, server: Any, concurrency: int, requests: int, seed: int) -> Run:
            first = concurrency == 2 and not any(call[1] == 2 for call in self.asked)
            found = super().__call__(server, concurrency, requests, seed)
            return dataclasses.replace(found, duration_seconds=9 * found.duration_seconds) if first else found

    ask = Hiccup({"int8": [10, 20, 40]})
    trial = run_trial(ask, (TimedServer("int8"),), settings(limit=4, concurrency=1))
    assert [round(one.tokens_per_second) for one in trial.curve] == [10, 20, 40]


def test_the_baseline_alone_has_no_ratios() -> None:
    trial = run_trial(Counted({"base": [10, 20]}), (TimedServer("base"),), settings(limit=2, concurrency=1))
    found = figures(trial, settings(), "generator 1")
    assert (found.ratios, found.baseline, found.baseline_curve, found.cost) == (None, None, [], None)
    assert found.main.requests == 5 * 4


# the generator's records


def test_records_are_read() -> None:
    found = read_reply(reply(), 2, 3, 1.5)
    assert found.requests[0] == Request(0.5, (0.25, 0.25), 1.0, 8, 3)
    assert found.requests[0].time_per_token_seconds == 0.25
    assert (found.duration_seconds, found.generator_cpu_seconds, found.server_cpu_seconds) == (2.0, 0.1, 1.5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"errors": ["Traceback:\n  line\nClientError: closed", ""]}, "ClientError: closed"),
        ({"output_lens": [2, 3]}, "the answer has 2 of 3 tokens"),
        ({"latencies": [0.4, 1.0]}, "the answer's times contradict each other"),
    ],
)
def test_a_failed_request_is_counted_and_not_averaged(changes: dict[str, Any], reason: str) -> None:
    found = read_reply(reply(**changes), 2, 3, 0.0)
    assert found.failures == (reason,)
    assert [one.first_token_seconds for one in found.requests] == [0.25]
    assert found.tokens_per_second == 3 / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ttfts": [0.5]}, r"result is not as expected \(.*lists differ in length\)"),
        ({"ttfts": [0.5, -1.0]}, r"ttfts\.1 is not as expected"),
        ({"duration": 0.0}, r"duration is not as expected"),
        ({"itls": None}, r"itls is not as expected"),
    ],
)
def test_a_strange_result_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        read_reply(reply(**changes), 2, 3, 0.0)


# over HTTP


@pytest.fixture(
    params=[
        "plain",
        pytest.param("vllm", marks=[pytest.mark.slow, pytest.mark.skipif(not OWN_VLLM, reason="needs vLLM")]),
    ]
)
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Generator]:
    """A generator: a small one of the tests; vLLM's benchmark in the environment that MODELPRESS_VLLM_PYTHON names."""
    tokenizer = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(str(tokenizer))
    log = tmp_path / "generator.log"
    plain = request.param == "plain"
    python = Path(sys.executable if plain else OWN_VLLM or "")
    with generator(python, tokenizer, log, 8, 11, DRIVER if plain else None) as found:
        yield found


def test_a_server_that_is_twice_as_fast(running: Generator) -> None:
    fast, slow = TimedServer("int8", 0.05, 0.02, **UNEVEN[0]), TimedServer("base", 0.1, 0.04, **UNEVEN[1])
    with answering(fast, slow):
        found = figures(run_trial(running.run, (fast, slow), SETTINGS), SETTINGS, "generator 1")
    assert found.ratios is not None
    for name, true in (("tokens_per_second", 2.0), ("time_per_token", 0.5)):
        one = found.ratios[name]
        assert one.low <= true <= one.high, (name, one)
        assert not one.low <= true * 0.75 <= one.high
        assert not one.low <= true * 1.33 <= one.high
        assert not one.tie
    assert found.baseline is not None
    assert 0.08 <= found.baseline.time_to_first_token.p50 <= 0.25
    assert 0.033 <= found.baseline.time_per_token.p50 <= 0.048
    assert found.main.failed == 0
    assert found.main.generator_cpu_seconds > 0
    assert found.main.server_cpu_seconds == 0.5 * 20  # as the server counts it
    assert fast.most_at_once == slow.most_at_once == 4
    assert all(body["ignore_eos"] and body["max_tokens"] == 11 for body in fast.asked)
    assert len({str(body["prompt"]) for body in fast.asked}) > len(fast.asked) / 2  # of so few tokens, some look alike


def test_equal_servers_are_a_tie(running: Generator) -> None:
    one, other = TimedServer("int8", 0.05, 0.02, **UNEVEN[0]), TimedServer("base", 0.05, 0.02, **UNEVEN[1])
    with answering(one, other):
        found = figures(run_trial(running.run, (one, other), SETTINGS), SETTINGS, "generator 1")
    assert found.ratios is not None
    assert found.ratios["tokens_per_second"].tie
    assert found.ratios["time_per_token"].tie


def test_failures_over_http_are_counted(running: Generator) -> None:
    with answering(TimedServer(fails=4, short=3)) as (server,):
        found = running.run(server, 2, 12, 0)
    broken = [number for number in range(1, 13) if number % 4 == 0]
    short = [number for number in range(1, 13) if number % 3 == 0 and number % 4]
    assert len(found.failures) == len(broken) + len(short)
    assert found.failures.count("the answer has 10 of 11 tokens") == len(short)
    assert len(found.requests) == 12 - len(found.failures)
    assert found.tokens_per_second == pytest.approx(11 * len(found.requests) / found.duration_seconds)


def test_a_server_that_ends_in_the_middle(running: Generator) -> None:
    message = (
        r"^timed server with int8 ended in the middle of the load test, at 4 requests at once; its last words: "
        r"RuntimeError: no memory left$"
    )
    with answering(TimedServer("int8", ends_after=10)) as (server,), pytest.raises(TaskError, match=message):
        run_trial(running.run, (server,), SETTINGS)


def test_a_server_that_answers_nothing(running: Generator) -> None:
    message = r"^timed server with int8 answered none of 3 requests of the load test in full: \S.*$"
    with answering(TimedServer("int8", fails=1)) as (server,), pytest.raises(TaskError, match=message):
        running.run(server, 1, 3, 0)


def test_a_generator_that_does_not_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)\n", encoding="utf-8")
    log = tmp_path / "generator.log"
    with (
        pytest.raises(TaskError, match=r"the load generator ended; see .*generator\.log"),
        generator(Path(sys.executable), tmp_path, log, 8, 11, broken),
    ):
        pass


def test_usage_beside_a_choice_is_told_apart() -> None:
    last = 'data: {"choices": [{"text": "%s"}], "usage": {"completion_tokens": 2}}'
    alone = {"choices": [], "usage": {"completion_tokens": 2}}
    assert [json.loads(one.removeprefix("data: ")) for one in usage_apart(last % "")] == [alone]
    token, usage = (json.loads(one.removeprefix("data: ")) for one in usage_apart(last % "word"))
    assert (token, usage) == ({"choices": [{"text": "word"}], "usage": None}, alone)
    for message in ("data: [DONE]", ": ping", 'data: {"choices": [{"text": "a"}], "usage": null}'):
        assert usage_apart(message) == [message]
    vllms = 'data: {"choices": [], "usage": {"completion_tokens": 2}}'
    assert usage_apart(vllms) == [vllms]
