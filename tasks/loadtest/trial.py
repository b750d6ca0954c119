"""The order of a load test: pairs by turns at one concurrency, then rising concurrency."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from tqdm import tqdm

from tasks.loadtest.generator import Ask, Endpoint
from tasks.loadtest.records import Run
from tasks.settings import LoadSettings

GAIN = 1.05  # a doubled concurrency must raise the throughput by more than this
WARM_UP, PAIRS, RISING, AGAIN = 0, 1_000, 10_000, 20_000  # first seeds: no prompt is sent to a server twice


@dataclass(frozen=True)
class Trial:
    """All runs of a load test.

    pairs: at the main concurrency, each with the variant's run and, if there is one, the baseline's. curve and
    baseline_curve: one run for each concurrency, 1, 2, 4, ..., up to the one that brought too little.
    """

    pairs: tuple[tuple[Run, ...], ...]
    curve: tuple[Run, ...]
    baseline_curve: tuple[Run, ...]


def run_trial(ask: Ask, servers: tuple[Endpoint, ...], settings: LoadSettings) -> Trial:
    """Ask the variant's server and, if it is given, the baseline's. Only one of them works at a time.

    servers: the variant's, and the baseline's to compare with. TaskError from `ask`.
    """
    for server in servers:
        ask(server, settings.concurrency, settings.concurrency, WARM_UP)
    requests = _whole(settings.requests, settings.concurrency)
    pairs = tuple(
        _in_turn(ask, servers, settings.concurrency, requests, PAIRS + turn, turn)
        for turn in tqdm(range(settings.pairs), desc="pairs")
    )
    curves = _rise(ask, servers, settings)
    return Trial(pairs, tuple(curves[0]), tuple(curves[1]) if len(curves) > 1 else ())


def saturation(curve: tuple[Run, ...]) -> int | None:
    """The concurrency that it brings 5% or less to double; None if the curve ends before."""
    for low, high in pairwise(curve):
        if not _gains(low, high):
            return low.concurrency
    return None


def _in_turn(
    ask: Ask, servers: tuple[Endpoint, ...], concurrency: int, requests: int, seed: int, turn: int
) -> tuple[Run, ...]:
    """One run of each server, in the opposite order in every other turn (ABBA), so that a drift of the machine's speed
    favours neither; returned in the order of `servers`."""
    order = range(len(servers)) if turn % 2 == 0 else reversed(range(len(servers)))
    runs = {place: ask(servers[place], concurrency, requests, seed) for place in order}
    return tuple(runs[place] for place in range(len(servers)))


def _rise(ask: Ask, servers: tuple[Endpoint, ...], settings: LoadSettings) -> list[list[Run]]:
    """The curves of the servers, each until it is saturated."""
    curves: list[list[Run]] = [[] for _ in servers]
    rising = list(range(len(servers)))
    for turn in tqdm(range(settings.limit.bit_length()), desc="rising load"):
        if not rising:
            break
        concurrency = 2**turn
        requests = _whole(max(settings.requests, 2 * concurrency), concurrency)
        runs = _in_turn(ask, tuple(servers[place] for place in rising), concurrency, requests, RISING + turn, turn)
        for place, run in zip(tuple(rising), runs, strict=True):
            before = curves[place][-1:]
            if before and not _gains(before[0], run):
                # a machine's other work only ever slows it down: believe it the second time
                run = _faster(run, ask(servers[place], concurrency, requests, AGAIN + turn))
                if not _gains(before[0], run):
                    rising.remove(place)
            curves[place].append(run)
    return curves


def _gains(low: Run, high: Run) -> bool:
    return high.tokens_per_second > GAIN * low.tokens_per_second


def _faster(one: Run, other: Run) -> Run:
    """The faster run, with the failures of both."""
    fast, slow = (one, other) if one.tokens_per_second >= other.tokens_per_second else (other, one)
    return replace(fast, failures=fast.failures + slow.failures)


def _whole(requests: int, concurrency: int) -> int:
    """At least `requests`, and a multiple of the concurrency, so that the last ones are not few at a time."""
    return -(-requests // concurrency) * concurrency
