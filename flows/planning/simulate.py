"""What a run of any model would take: every stage's need on a machine, and the run as the flow would schedule it.

Neither weights nor a model library are needed: the model is its config.json, the machine its measured or given figures.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.errors import FlowError
from flows.graph.schedule import Upstreams, startable, threads_of
from flows.processes.run_module import error_line, run_module
from tasks.errors import TaskError
from tasks.planning.estimate import Need, PlanJob, estimate
from tasks.planning.machine import Machine, check_machine, read_machine, write_machine
from tasks.planning.shape import Shape, read_shape
from tasks.settings import Settings

MACHINES = Path(".modelpress/machines")  # what was measured, by the host's name: a checkout may be shared


@dataclass(frozen=True)
class RunEstimate:
    """needs: of each stage; begins: seconds after the run's start, a stage whose time is not known taking none;
    seconds: of the whole run; memory: the most that stages hold at one time, bytes, and which they are; disk: bytes
    that stay; scratch: the most that is needed beside them for a while."""

    needs: Mapping[str, Need]
    begins: Mapping[str, float]
    seconds: float
    memory: float
    together: tuple[str, ...]
    disk: float
    scratch: float


def simulate(upstreams: Upstreams, shape: Shape, settings: Settings, machine: Machine, jobs: int) -> RunEstimate:
    """Run the graph on paper: stages start as flows/graph/schedule.py lets them, with the threads it gives them."""
    needs = {
        stage: estimate(
            stage, PlanJob(shape, settings, machine.share(threads_of(stage, (), (stage,), jobs, machine.cores)))
        )
        for stage in upstreams
    }
    begins: dict[str, float] = {}
    ends: dict[str, float] = {}
    done: list[str] = []
    now = memory = scratch = 0.0
    together: tuple[str, ...] = ()
    while len(done) < len(needs):
        for stage in startable(upstreams, done, list(ends), jobs):
            begins[stage], ends[stage] = now, now + (needs[stage].seconds or 0.0)
        running = tuple(ends)
        held = sum(needs[stage].memory or 0.0 for stage in running)
        if held > memory:
            memory, together = held, running
        scratch = max(scratch, sum(needs[stage].scratch for stage in running))
        next_one = min(ends, key=lambda stage: ends[stage])
        now = ends.pop(next_one)
        done.append(next_one)
    return RunEstimate(needs, begins, now, memory, together, sum(need.disk for need in needs.values()), scratch)


def read_model(root: Path, model: str) -> Shape:
    """The shape of the model: a config.json, a folder with one, or hf:organisation/name@revision, of which config.json
    alone is fetched. FlowError where there is none that a plan can be made for."""
    path = Path(model.removeprefix("path:")).expanduser()
    if model.startswith("hf:"):
        status, lines = run_module(root, "tasks.planning.shape", model)
        if status:
            raise FlowError(error_line(lines, status))
        path = root / lines[-1]
    elif path.is_dir():
        path /= "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FlowError(
            f"{path} is not there; name a config.json, a folder with one, or hf:organisation/name@revision"
        ) from error
    except (OSError, ValueError) as error:
        raise FlowError(f"{path} is no model's config.json: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise FlowError(f"{path} holds {type(config).__name__}, expected the object of a model's config.json")
    try:
        return read_shape(config, str(path))
    except TaskError as error:
        raise FlowError(str(error)) from error


def read_or_measure(root: Path, given: Path | None, anew: bool, changes: Mapping[str, Any]) -> Machine:
    """The machine that is planned for: the file `given`, or this one, measured once and then kept in .modelpress/.

    changes: figures to replace, those that are None left out; the result then says that they were given."""
    try:
        if given is not None:
            machine = read_machine(given)
        else:
            kept = root / MACHINES / f"{socket.gethostname()}.yaml"
            if anew or not _still_true(kept):
                write_machine(kept, measure(root))
            machine = read_machine(kept)
        wanted = {name: value for name, value in changes.items() if value is not None}
        if wanted:
            source = f"{machine.source}; given: {', '.join(sorted(wanted))}"
            machine = check_machine(machine.model_dump() | wanted | {"source": source}, "the options")
    except TaskError as error:
        raise FlowError(str(error)) from error
    return machine


def _still_true(kept: Path) -> bool:
    """Whether what was kept can be read, and is of a machine with as many cores."""
    try:
        return read_machine(kept).cores == cores_here()
    except TaskError:  # another version wrote it, or nobody did
        return False


def measure(root: Path) -> Machine:
    """This machine's figures, measured in a process of its own; TaskError where they are none."""
    status, lines = run_module(root, "tasks.planning.measure_machine")
    if status:
        raise FlowError(f"this machine could not be measured: {error_line(lines, status)}")
    # libraries may have spoken before
    start = next(number for number, line in enumerate(lines) if line.startswith("name: "))
    return check_machine(yaml.safe_load("\n".join(lines[start:])), "tasks.planning.measure_machine")


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
