"""SIGKILL of the worker and of the server under `modelpress serve`, during a deployed run."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

from flows.processes.process import Process
from tests.drills import toy as pipeline
from tests.drills.away import closed_port
from tests.drills.processes import PATIENCE, family, orphans, strike
from tests.drills.yard import Tally, Yard, last_line
from tests.functional.toy import STAGES, Toy, cli_command, cli_env
from tests.waiting import soon

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
START_SECONDS = 300.0  # for all services, on a busy machine
RUN_SECONDS = 150.0  # for a deployed run, including a restart of a service
WRITING = "1.0"  # writing time of a stage, seconds
TRIES = 2  # deployed runs: the disturbed one, and the next


def kill_service(yard: Yard) -> Tally:
    """Kill Prefect's server and the worker in each stage: `serve` restarts them, the run or the next one finishes."""
    tally = Tally("server, worker killed")
    toy = yard.toy()
    api = f"http://127.0.0.1:{(port := closed_port())}/api"
    with _serving(yard, toy, port):
        moments = product(range(yard.rounds), STAGES, ("server", "worker"))
        for number, (_, stage, victim) in enumerate(moments, start=1):
            tally.count += 1
            for first in ("download", "report"):  # and so all stages run
                pipeline.turn(toy, first, 10 + number)
            pipeline.commit(toy)
            tally.recovered += _strike(yard, toy, tally, api, victim, stage, f"{victim}-{number}")
    tally.lost += [f"orphan: {line}" for line in orphans(toy.root)]
    return tally


def _strike(yard: Yard, toy: Toy, tally: Tally, api: str, victim: str, stage: str, name: str) -> bool:
    """A deployed run, one kill while `stage` is running, and its result by tag."""
    tries = []
    run = _create(api, name)
    if not soon(lambda: _at_work(toy, name, stage), RUN_SECONDS):
        tally.lost.append(f"{victim}: {stage} did not start: {_state(api, run)}")
        return False
    time.sleep(yard.dice.uniform(0, float(WRITING)))
    struck = strike(family(os.getpid(), lambda line: line[3:6] == ["prefect", "--no-prompt", victim]))
    then = time.monotonic()
    for attempt in range(TRIES):
        soon(lambda run=run: _state(api, run) in FINAL, RUN_SECONDS)  # type: ignore[misc]
        tries.append(_state(api, run))
        blow = f"{stage:<20} {victim} {'struck' if struck else 'missed'}"
        yard.say(f"{blow}: {tries[-1]} {time.monotonic() - then:.0f} s later")
        if tries[-1] == "COMPLETED" or attempt == TRIES - 1:
            break
        name = f"{name}-again"
        run = _create(api, name)
    if tries[-1] != "COMPLETED":
        tally.lost.append(f"{victim}: {', then '.join(tries)}")
        return False
    before = len(tally.lost)
    tally.lost += [f"{victim}: {line}" for line in _differences(yard, toy, f"run/{name}")]
    return len(tally.lost) == before


def _differences(yard: Yard, toy: Toy, tag: str) -> Iterator[str]:
    """Yield the differences between the outputs of the tag and those of an undisturbed run."""
    clone = Toy(yard.root / tag.replace("/", "-"))
    toy.command("git", "clone", "--quiet", "--branch", tag, str(toy.root), str(clone.root))
    clone.write(".dvc/config.local", f"[cache]\n    dir = {toy.root}/.dvc/cache\n")
    clone.dvc("repro", "--quiet")
    if ran := clone.executed():
        yield f"{tag} had to compute {', '.join(ran)}"
    found, right = pipeline.outputs(clone.root), yard.right(clone)
    yield from (f"{path} of {tag} differs" for path in sorted({*found, *right}) if found.get(path) != right.get(path))


def _at_work(toy: Toy, name: str, stage: str) -> bool:
    """Whether the stage of the run has started in its workspace."""
    times = toy.root / ".modelpress/runs" / name / "times.jsonl"
    return times.exists() and f'["{stage}", "start"' in times.read_text(encoding="utf-8")


@contextmanager
def _serving(yard: Yard, toy: Toy, port: int) -> Iterator[None]:
    """Run `modelpress serve` for the duration of the drill."""
    env = cli_env(**yard.env(DRILL_SECONDS=WRITING), PREFECT_HOME=str(toy.root / ".prefect"))
    del env["PREFECT_API_URL"]
    command = cli_command("serve", "--port", str(port), "--mlflow-port", str(closed_port()))
    with (
        (toy.root.parent / "serve.log").open("w", encoding="utf-8") as log,
        Process(command, toy.root, env, output=log.fileno()) as serve,
    ):
        soon(lambda: "press Ctrl-C" in _read(toy) or not serve.alive, START_SECONDS)
        if "press Ctrl-C" not in _read(toy):
            raise RuntimeError(f"modelpress serve did not start: {last_line(_read(toy))}")
        yield


def _read(toy: Toy) -> str:
    return (toy.root.parent / "serve.log").read_text(encoding="utf-8")


def _create(api: str, name: str) -> str:
    """Start `press/on-demand` like the button in the pages; return the run's id. The server may be restarting."""
    found: list[str] = []

    def ask() -> bool:
        try:
            deployment = _ask(api, "/deployments/name/press/on-demand")["id"]
            found.append(_ask(api, f"/deployments/{deployment}/create_flow_run", {"name": name})["id"])
        except OSError:
            time.sleep(0.5)
        return bool(found)

    soon(ask, PATIENCE)
    return found[0]


def _state(api: str, run: str) -> str:
    try:
        return str(_ask(api, f"/flow_runs/{run}")["state_type"])
    except OSError:
        time.sleep(0.5)
        return "no answer"


def _ask(api: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{api}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())
