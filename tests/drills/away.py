"""Unreachable servers: MLflow's for a whole run, the model hub during a download."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

from tests.drills import toy as pipeline
from tests.drills.processes import PATIENCE
from tests.drills.yard import Tally, Yard, last_line
from tests.functional.toy import PROJECT
from tests.hub import FakeHub, Repository, running_hub
from tests.waiting import soon

SIZE = 24 << 20  # of the file on the hub; its library writes in chunks of 10 MiB
FETCH = """
import sys
from pathlib import Path
from tasks.errors import TaskError
from tasks.sources import fetch_file
try:
    print(fetch_file("hf:acme/big@main/data.parquet", None, Path("scratch")).file)
except TaskError as error:
    sys.exit(f"error: {error}")
"""


def closed_port() -> int:
    """A port without a server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mlflow_away(yard: Yard) -> Tally:
    """MLFLOW_TRACKING_URI is unreachable: the run completes and reports it; the next one is recorded."""
    tally = Tally("MLflow away")
    toy = yard.toy()
    yard.run(toy)  # creates its store, with one run
    for number in range(yard.rounds):
        pipeline.turn(toy, "report", 1 + number)
        recorded = len(toy.mlflow_runs())
        tally.count += 1
        done = yard.run(toy, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{closed_port()}")
        yard.say(f"status {done.returncode}: {last_line(done.stdout)}")
        if done.returncode or "does not work" not in done.stderr:
            tally.lost.append(f"the run should continue and report that it is not recorded: {last_line(done.stderr)}")
        yard.compare(toy, tally)
        well = yard.end(toy, tally)
        if len(toy.mlflow_runs()) != recorded + 1:
            tally.lost.append("the result is not in MLflow after the next run")
            well = False
        tally.recovered += well
    return tally


def hub_away(yard: Yard) -> Tally:
    """The hub breaks off, the download is killed, the hub disappears and returns: only missing bytes are fetched."""
    tally = Tally("hub away")
    for number in range(yard.rounds):
        folder = yard.root / f"hub-{number}"
        folder.mkdir(parents=True)
        content = random.Random(number).randbytes(SIZE)
        tally.count += 1
        losses = len(tally.lost)
        with running_hub() as hub:
            hub.repositories["datasets/acme/big"] = Repository({"data.parquet": content})
            hub.break_after, hub.hang = [yard.dice.randrange(11 << 20, SIZE)], True
            if not _killed_in_the_middle(hub, folder):
                tally.lost.append("the download did not start")
            gone, word = _end(_start(folder, f"http://127.0.0.1:{closed_port()}"))
            yard.say(f"hub gone: status {gone}: {word}")
            if gone != 1 or not word.startswith("error: ") or "HF_ENDPOINT" not in word:
                tally.lost.append(f"a missing hub should be one line with a remedy: {word}")
            hub.hang = False
            tally.recovered += _fetched(hub, folder, content, tally) and len(tally.lost) == losses
    return tally


def _killed_in_the_middle(hub: FakeHub, folder: Path) -> bool:
    """Whether the download was killed with a partial file."""
    process, parts = _start(folder, hub.endpoint), folder / ".modelpress/downloads/hub"
    begun = soon(lambda: any(part.stat().st_size >= 10 << 20 for part in parts.glob("*.part")), PATIENCE)
    process.kill()
    process.wait()
    return begun


def _fetched(hub: FakeHub, folder: Path, content: bytes, tally: Tally) -> bool:
    """Whether the file arrives complete, without fetching any bytes again."""
    status, word = _end(_start(folder, hub.endpoint))
    if status:
        tally.lost.append(f"the download did not resume: {word}")
        return False
    found = hashlib.sha256((folder / word).read_bytes()).hexdigest()
    if found != hashlib.sha256(content).hexdigest():
        tally.lost.append("the resumed file differs")
    if not hub.ranges():
        tally.lost.append("fetched bytes were fetched again")
    tally.lost += [f"left behind: {part}" for part in (folder / ".modelpress/downloads/hub").glob("*.part")]
    return True


def _start(folder: Path, endpoint: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1,localhost"}
    env.pop("HF_TOKEN", None)
    command = [sys.executable, "-c", FETCH]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, last_line(output)
