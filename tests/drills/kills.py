"""SIGKILL at a random moment of a run: of the stage, DVC, the flow's process, or the run's Prefect server.

For every stage, its knob is turned, a run is started, and the victim is killed while that stage is running. The next
round continues from there; a last run must finish with the bytes of an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

from tests.drills import toy as pipeline
from tests.drills.processes import PATIENCE, family, is_dvc, is_server, is_stage, orphans, strike
from tests.drills.yard import SECONDS, Tally, Yard, finish
from tests.functional.toy import STAGES, Toy
from tests.waiting import soon

Victims = Callable[[int, str], list[psutil.Process]]  # by the run's process and the running stage


def kill_stage(yard: Yard) -> Tally:
    """Kill the stage's process."""
    return _kill(yard, "stage killed", lambda run, stage: family(run, lambda words: is_stage(words, stage)), 0.8)


def kill_dvc(yard: Yard) -> Tally:
    """Kill DVC before, during or after its stage's writes."""
    return _kill(yard, "DVC killed", lambda run, stage: family(run, lambda words: is_dvc(words, stage)), 1.4)


def kill_flow(yard: Yard) -> Tally:
    """Kill `modelpress run`."""
    return _kill(yard, "flow killed", lambda run, stage: [psutil.Process(run)], 1.6)


def kill_server(yard: Yard) -> Tally:
    """Kill the run's own Prefect server."""
    return _kill(yard, "run's server killed", lambda run, stage: family(run, is_server), 1.0, PREFECT_API_URL="")


def _kill(yard: Yard, fault: str, victims: Victims, span: float, **env: str) -> Tally:
    """Kill once for every stage, at a moment within `span` times its writing time."""
    tally = Tally(fault)
    toy = yard.toy()
    open_faults = 0
    for number in range(yard.rounds):
        for stage in STAGES:
            pipeline.turn(toy, stage, 1 + number)
            struck = _strike(yard, toy, tally, stage, victims, span * SECONDS, env)
            open_faults += struck
    tally.count = open_faults
    if yard.end(toy, tally):
        tally.recovered = open_faults
    return tally


def _strike(yard: Yard, toy: Toy, tally: Tally, stage: str, victims: Victims, span: float, env: dict[str, str]) -> int:
    """One run with one kill; return the number of killed processes."""
    before, began = pipeline.outputs(toy.root), toy.executed().count(stage)
    moment = yard.dice.uniform(0, span)
    run = yard.start(toy, **env)
    soon(lambda: toy.executed().count(stage) > began or run.poll() is not None, PATIENCE, tick=0.02)
    if toy.executed().count(stage) == began or run.poll() is not None:
        run.kill()
        tally.lost.append(f"{stage}: the run before did not recover: {finish(run)[1]}")
        return 1
    time.sleep(moment)
    struck = min(1, strike(victims(run.pid, stage)))
    start = time.monotonic()
    status, word = finish(run)
    yard.say(f"{stage:<20} {moment:.2f} s, {'struck' if struck else 'missed'}: status {status}, "
             f"{time.monotonic() - start:.1f} s later: {word}")  # fmt: skip
    if status == -1:
        tally.lost.append(f"{stage}: {word}")
    tally.lost += [f"{stage}: orphan {line}" for line in orphans(toy.root)]
    if status == 1:
        _require_whole(toy, tally, stage, before)
    return struck


def _require_whole(toy: Toy, tally: Tally, stage: str, before: dict[str, str]) -> None:
    """Check that the outputs of the failed stage are restored, unless the run itself was killed."""
    if stage in _unfinished(toy):
        outs = pipeline.outs_of(stage)
        now = pipeline.outputs(toy.root)
        half = [path for path in {*before, *now} if path.startswith(outs) and before.get(path) != now.get(path)]
        tally.lost += [f"{stage}: {path} is neither restored nor finished" for path in half]


def _unfinished(toy: Toy) -> list[str]:
    """The stages that are out of date for DVC."""
    from flows.graph.plan import read_plan

    return [name for name, planned in read_plan(toy.root).items() if planned.state == "changed"]
