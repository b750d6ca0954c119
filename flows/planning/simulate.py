"""What a run with any model would take: each stage's measured need, and the run as the flow would schedule it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.errors import FlowError
from flows.graph.schedule import Upstreams, startable, threads_of
from flows.planning import LAST
from flows.processes.run_module import error_line, run_module
from tasks.errors import TaskError
from tasks.hardware import cpu_cores
from tasks.planning.need import Measurement, Need, carried, read_measurement

FOLDER = Path(".modelpress/plans")


@dataclass(frozen=True)
class RunEstimate:
    """begins: seconds from the start of the run to each stage's start, in order; stages of unknown time count as zero.

    seconds: of the whole run. memory: the largest sum over stages that run together, bytes. together: these stages.
    disk: bytes that stay. scratch: the largest temporary need beside them.
    """

    begins: Mapping[str, float]
    seconds: float
    memory: float
    together: tuple[str, ...]
    disk: float
    scratch: float


def simulate(upstreams: Upstreams, needs: Mapping[str, Need], jobs: int) -> RunEstimate:
    """Schedule the graph as flows/graph/schedule.py would, without running it."""
    begins: dict[str, float] = {}
    ends: dict[str, float] = {}
    done: list[str] = []
    now = memory = scratch = 0.0
    together: tuple[str, ...] = ()
    while len(done) < len(upstreams):
        for stage in startable(upstreams, done, list(ends), jobs):
            begins[stage], ends[stage] = now, now + (needs[stage].seconds or 0.0)
        held = sum(needs[stage].memory for stage in ends)
        if held > memory:
            memory, together = held, tuple(ends)
        scratch = max(scratch, sum(needs[stage].scratch for stage in ends))
        done.append(min(ends, key=lambda stage: ends[stage]))
        now = ends.pop(done[-1])
    return RunEstimate(begins, now, memory, together, sum(need.disk for need in needs.values()), scratch)


def measure(
    root: Path, model: str, upstreams: Upstreams, jobs: int, there: Path | None, seconds: float
) -> tuple[Measurement, Path]:
    """Measure the stages for `model` here for about `seconds`, or take their times from `there`, a measurement of
    another machine.

    Returns the measurement and its file. FlowError if the model or the file cannot be used.
    """
    kept = FOLDER / f"{re.sub(r'[^A-Za-z0-9]+', '-', model).strip('-')[-60:]}.json"
    cores = cpu_cores()
    try:
        elsewhere = read_measurement(there) if there else None
        cores = elsewhere.cores if elsewhere else cores
        threads = [f"{stage}={threads_of(stage, (), (stage,), jobs, cores)}" for stage in upstreams]
        limit = "0" if elsewhere else str(seconds - LAST)
        status, output = run_module(root, "tasks.planning", model, str(kept), limit, *threads)
        if status:
            raise FlowError(error_line(output, status))
        found = read_measurement(root / kept)
        return (carried(elsewhere, found), there) if elsewhere and there else (found, kept)
    except TaskError as error:
        raise FlowError(str(error)) from error
