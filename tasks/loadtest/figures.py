"""The figures of a load test: latencies, throughput, goodput, cost, and ratios to the baseline with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, norm, t

from tasks.loadtest.records import Request, Run
from tasks.loadtest.trial import Trial, saturation
from tasks.settings import LoadSettings, ObjectiveSettings

CONFIDENCE = 0.95
RESAMPLES = 20_000
SEED = 1234
ENOUGH_FOR_P99 = 1000  # requests

FIRST_TOKEN, PER_TOKEN, LATENCY, THROUGHPUT = (
    "time_to_first_token",
    "time_per_token",
    "latency",
    "tokens_per_second",
)


@dataclass(frozen=True)
class Percentiles:
    """Seconds. p99: None with fewer than 1,000 requests."""

    p50: float
    p95: float
    p99: float | None


@dataclass(frozen=True)
class Level:
    """One server at one concurrency.

    requests: answered in full; failed: the others, which count for nothing else. time_to_first_token, latency: of each
    request (TTFT, end to end). time_per_token: of each request, the mean after the first token (TPOT). gap: between the
    parts of the streamed answers (ITL). goodput: requests per second that met the objective. generator_share: of the
    processor time of generator and server together.
    """

    concurrency: int
    requests: int
    failed: int
    tokens_per_second: float
    requests_per_second: float
    goodput: float
    time_to_first_token: Percentiles
    time_per_token: Percentiles
    gap: Percentiles
    latency: Percentiles
    generator_cpu_seconds: float
    server_cpu_seconds: float
    generator_share: float | None


@dataclass(frozen=True)
class Ratio:
    """Variant over baseline: the geometric mean over the pairs, with a 95% interval. tie: it contains 1."""

    mean: float
    low: float
    high: float
    tie: bool


@dataclass(frozen=True)
class Cost:
    """Of a million new tokens, in the currency of `price`, for a machine that is never idle.

    lowest: at the concurrency with the highest throughput. within_objective: where the most requests meet the
    objective, and only these count; None if none does.
    """

    price: float
    lowest: float
    within_objective: float | None


@dataclass(frozen=True)
class Load:
    """The figures of a load test, for metrics/load/.

    main: the variant at the main concurrency, over all pairs; baseline: the same for the baseline in this run.
    saturation: the concurrency that it brings 5% or less to double; None if `limit` is reached before.
    ratios: by figure, tokens_per_second and the medians of the three times; None without a baseline to compare with.
    failures: the different reasons, at most three. comparison_note: why there are no ratios.
    """

    generator: str
    prompt_tokens: int
    new_tokens: int
    pairs: int
    limit: int
    objective: dict[str, float]
    main: Level
    baseline: Level | None
    curve: list[Level]
    baseline_curve: list[Level]
    saturation: int | None
    baseline_saturation: int | None
    highest_goodput: float
    ratios: dict[str, Ratio] | None
    cost: Cost | None
    failures: list[str]
    comparison_note: str | None


# the figures that are compared, of one run
COMPARED: dict[str, Callable[[Run], float]] = {
    THROUGHPUT: lambda run: run.tokens_per_second,
    FIRST_TOKEN: lambda run: statistics.median(request.first_token_seconds for request in run.requests),
    PER_TOKEN: lambda run: statistics.median(request.time_per_token_seconds for request in run.requests),
    LATENCY: lambda run: statistics.median(request.latency_seconds for request in run.requests),
}


def figures(trial: Trial, settings: LoadSettings, generator: str, comparison_note: str | None = None) -> Load:
    """All figures of a trial. generator: its name and version."""
    compared = len(trial.pairs[0]) > 1
    main = level([pair[0] for pair in trial.pairs], settings.objective)
    curve = [level([run], settings.objective) for run in trial.curve]
    every = [*curve, main]
    runs = [*(run for pair in trial.pairs for run in pair), *trial.curve, *trial.baseline_curve]
    return Load(
        generator=generator,
        prompt_tokens=round(statistics.median(r.prompt_tokens for run in runs for r in run.requests)),
        new_tokens=settings.new_tokens,
        pairs=len(trial.pairs),
        limit=settings.limit,
        objective=settings.objective.model_dump(),
        main=main,
        baseline=level([pair[1] for pair in trial.pairs], settings.objective) if compared else None,
        curve=curve,
        baseline_curve=[level([run], settings.objective) for run in trial.baseline_curve],
        saturation=saturation(trial.curve),
        baseline_saturation=saturation(trial.baseline_curve),
        highest_goodput=max(one.goodput for one in every),
        ratios=ratios([(pair[0], pair[1]) for pair in trial.pairs]) if compared else None,
        cost=cost(every, settings.price, settings.new_tokens),
        failures=list(dict.fromkeys(reason for run in runs for reason in run.failures))[:3],
        comparison_note=comparison_note,
    )


def level(runs: Sequence[Run], objective: ObjectiveSettings) -> Level:
    """The figures of runs of one server at one concurrency, over all their requests."""
    requests = [request for run in runs for request in run.requests]
    seconds = sum(run.duration_seconds for run in runs)
    generator = sum(run.generator_cpu_seconds for run in runs)
    server = sum(run.server_cpu_seconds for run in runs)
    many = len(requests) >= ENOUGH_FOR_P99
    return Level(
        concurrency=runs[0].concurrency,
        requests=len(requests),
        failed=sum(len(run.failures) for run in runs),
        tokens_per_second=_rounded(sum(request.new_tokens for request in requests) / seconds),
        requests_per_second=_rounded(len(requests) / seconds),
        goodput=_rounded(sum(meets(request, objective) for request in requests) / seconds),
        time_to_first_token=percentiles((request.first_token_seconds for request in requests), many),
        time_per_token=percentiles((request.time_per_token_seconds for request in requests), many),
        gap=percentiles((gap for request in requests for gap in request.gaps_seconds), many),
        latency=percentiles((request.latency_seconds for request in requests), many),
        generator_cpu_seconds=round(generator, 2),
        server_cpu_seconds=round(server, 2),
        generator_share=_rounded(generator / (generator + server)) if generator + server else None,
    )


def percentiles(values: Iterable[float], many: bool) -> Percentiles:
    """Percentiles with linear interpolation. many: whether there are enough requests for the 99th."""
    found = list(values)
    p50, p95, p99 = (_rounded(float(value)) for value in np.percentile(found, (50, 95, 99)))
    return Percentiles(p50, p95, p99 if many else None)


def meets(request: Request, objective: ObjectiveSettings) -> bool:
    """Whether a request meets the objective."""
    return request.first_token_seconds <= objective.ttft and request.time_per_token_seconds <= objective.tpot


def cost(levels: Sequence[Level], price: float | None, new_tokens: int) -> Cost | None:
    """The cost of a million new tokens at a price of the machine for an hour; None without a price."""
    if price is None:
        return None
    second = price / 3600
    good = max(one.goodput for one in levels) * new_tokens
    return Cost(
        price=price,
        lowest=_rounded(1e6 * second / max(one.tokens_per_second for one in levels)),
        within_objective=_rounded(1e6 * second / good) if good else None,
    )


def ratios(pairs: Sequence[tuple[Run, Run]]) -> dict[str, Ratio]:
    """Each compared figure of the variant over the baseline's, from pairs of their runs."""
    return {
        name: ratio([value(variant) / value(baseline) for variant, baseline in pairs])
        for name, value in COMPARED.items()
    }


def ratio(values: Sequence[float]) -> Ratio:
    """The geometric mean of paired ratios with a bootstrap interval over the pairs.

    The interval is the expanded percentile interval (T. Hesterberg, What Teachers Should Know About the Bootstrap,
    2015): with few pairs the plain percentile interval is too narrow, with 5 by a third.
    """
    logs = np.log(np.asarray(values))
    if np.ptp(logs) < 1e-12:  # no spread to resample
        low = high = float(logs[0])
    else:
        found = bootstrap(
            (logs,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=expanded(CONFIDENCE, len(logs)),
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    low, mean, high = (_rounded(math.exp(value)) for value in (low, float(logs.mean()), high))
    return Ratio(mean, low, high, low <= 1 <= high)


def expanded(confidence: float, count: int) -> float:
    """The nominal confidence of the percentile interval over `count` values with the true `confidence`."""
    wide = math.sqrt(count / (count - 1)) * t.ppf((1 + confidence) / 2, count - 1)
    return float(1 - 2 * norm.cdf(-wide))


def _rounded(value: float) -> float:
    """Five significant digits: more than was measured."""
    return float(f"{value:.5g}")
