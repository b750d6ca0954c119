"""The environment of drills: temporary repositories, a shared Prefect server, and the expected outputs."""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.drills import toy as pipeline
from tests.drills.processes import PATIENCE, orphans
from tests.functional.toy import Toy, cli_command, cli_env
from tests.waiting import halted

SECONDS = 0.6  # writing time of a stage of the toy pipeline


@dataclass
class Tally:
    """The results for one kind of fault. lost: a line for each failure."""

    fault: str
    count: int = 0
    recovered: int = 0
    lost: list[str] = field(default_factory=list)
    remark: str = ""

    @property
    def sound(self) -> bool:
        """Whether everything recovered."""
        return self.count > 0 and self.recovered == self.count and not self.lost


@dataclass
class Yard:
    """The folder and random generator of one drill. server: the API of the shared Prefect server."""

    name: str
    root: Path
    server: str
    finished: Toy  # never changed
    dice: random.Random
    rounds: int = 1
    _right: dict[str, dict[str, str]] = field(default_factory=dict)

    def toy(self, name: str = "toy") -> Toy:
        """Create a finished pipeline with this name; every drill has its own."""
        self.root.mkdir(exist_ok=True)
        return pipeline.copy(self.finished, self.root / name)

    def say(self, line: str) -> None:
        """Print progress, unless the drill was interrupted."""
        if not halted.is_set():
            print(f"{self.name:<8} {line}", flush=True)

    def env(self, **env: str) -> dict[str, str]:
        """The environment of a run."""
        return {"PREFECT_API_URL": self.server, "DRILL_SECONDS": str(SECONDS), "OMP_NUM_THREADS": "1", **env}

    def start(self, toy: Toy, **env: str) -> subprocess.Popen[str]:
        """Start `modelpress run`."""
        return toy.start_cli("run", **self.env(**env))

    def run(self, toy: Toy, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `modelpress ARGUMENTS`, by default `run`, until it ends."""
        command = cli_command(*(arguments or ("run",)))
        environment = cli_env(**self.env(DRILL_SECONDS="0", **env))
        return subprocess.run(
            command, cwd=toy.root, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE, check=False
        )

    def right(self, toy: Toy) -> dict[str, str]:
        """The outputs of an undisturbed `dvc repro` of the same definition."""
        key = toy.read("knobs.yaml") + toy.read("params.yaml")
        if key not in self._right:
            self.root.mkdir(exist_ok=True)
            other = pipeline.create(self.root / f"right-{len(self._right)}")
            for path in ("knobs.yaml", "params.yaml"):
                other.write(path, toy.read(path))
            other.dvc("repro", "--quiet")
            self._right[key] = pipeline.outputs(other.root)
        return self._right[key]

    def end(self, toy: Toy, tally: Tally, *, repair: bool = False) -> bool:
        """Repair if requested, run to the end, compare with the expected outputs; return whether all is well."""
        before = len(tally.lost)
        if repair:
            done = self.run(toy, "doctor", "--repair")
            self.say(f"doctor --repair: {'; '.join(done.stdout.splitlines()) or done.stderr.strip()}")
        done = self.run(toy)
        if done.returncode:
            tally.lost.append(f"the next run failed: {last_line(done.stderr)}")
            return False
        self.compare(toy, tally)
        tally.lost += [f"orphan: {line}" for line in orphans(toy.root)]
        return len(tally.lost) == before

    def compare(self, toy: Toy, tally: Tally) -> None:
        """Record every file that differs from an undisturbed run."""
        found, right = pipeline.outputs(toy.root), self.right(toy)
        wrong = sorted(path for path in {*found, *right} if found.get(path) != right.get(path))
        tally.lost += [f"{path} differs from an undisturbed run's" for path in wrong]


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a run to end; return its status and its last line."""
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return -1, f"did not end within {PATIENCE:.0f} s: {last_line(output)}"
    return process.returncode, last_line(output)


def last_line(text: str) -> str:
    """The last non-empty line."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "(no output)")
