"""A pipeline like the real one with instant stages: real git, DVC and dvc.yaml, no models."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.processes.process import Process

PROJECT = Path(__file__).resolve().parents[2]
VARIANTS = ("base", "int8", "gptq-int4")
TERMINAL = {"NO_COLOR": "1", "COLUMNS": "200"}
STAGES = ["download", *(f"{kind}@{name}" for kind in ("quantize", "load") for name in VARIANTS), "report"]

DVC_YAML = """
stages:
  download:
    cmd: python stage.py download models/source
    deps: [stage.py]
    params: [model]
    outs: [models/source]
  quantize:
    foreach: ${variants}
    do:
      cmd: python stage.py quantize@${key} models/${key} metrics/quantize/${key}.json
      deps: [stage.py, models/source]
      params: ["variants.${key}"]
      outs: ["models/${key}"]
      metrics: ["metrics/quantize/${key}.json": {cache: false}]
  load:
    foreach: ${variants}
    do:
      cmd: python stage.py load@${key} - metrics/load/transformers/${key}.json
      deps: [stage.py, "models/${key}"]
      metrics: ["metrics/load/transformers/${key}.json": {cache: false}]
  report:
    cmd: python stage.py report report
    deps: [stage.py, metrics/quantize, metrics/load]
    params: [variants, gate]
    outs: [report]
"""

# additions for a pipeline that ends with a package: every item's result, and the bundle
PACKAGING = """
  evaluate:
    foreach: ${variants}
    do:
      cmd: python stage.py evaluate@${key} results/transformers/${key} metrics/evaluate/transformers/${key}.json
      deps: [stage.py, "models/${key}"]
      params: [evaluation, "variants.${key}"]
      outs: ["results/transformers/${key}"]
      metrics: ["metrics/evaluate/transformers/${key}.json": {cache: false}]
  package:
    foreach: ${targets}
    do:
      cmd: python stage.py package@${item} dist/${package.name}-${item}
      deps: [stage.py, report, results]
      params: [package, variants, evaluation]
      outs: ["dist/${package.name}-${item}"]
"""

# the real package of the stages, except the program that checks the settings, which needs a model
TASKS = f"""
__path__.append({str(PROJECT / "tasks")!r})
"""
PREFLIGHT = """
import sys
from pathlib import Path

wish = Path("wish/preflight")
sys.exit(wish.read_text() if wish.exists() else 0)
"""

# files in wish/ control the stages; no stage depends on them
STAGE = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
import yaml

name, out, *metrics = sys.argv[1:]
wish = Path("wish") / name
wish = wish.read_text() if wish.exists() else ""
with open("times.jsonl", "a") as file:
    file.write(json.dumps([name, "start", time.time()]) + "\\n")
print(f"working on {name}", flush=True)
if wish == "fail":
    sys.exit(f"error: {name} found 3, expected 4; fix it")
if wish.startswith("away"):  # fail this many times, as without a network
    Path(f"tries-{name}").open("a").write("x")
    if len(Path(f"tries-{name}").read_text()) <= int(wish.split()[1]):
        print("error: the hub is away", file=sys.stderr)
        sys.exit(75)
if wish in ("killed", "no memory"):
    ballast = b"x" * 300_000_000
    time.sleep(1.5)  # so that the memory is sampled
    if wish == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("error: out of memory; lower something", file=sys.stderr)
    sys.exit(71)
if wish == "wait" or wish.startswith("sleep"):
    Path(f"pid-{name}").write_text(str(os.getpid()))
if wish.startswith("sleep"):
    time.sleep(float(wish.split()[1]))
while wish == "wait" and not Path(f"go-{name}").exists():
    time.sleep(0.1)
params = yaml.safe_load(Path("params.yaml").read_text())
variant = name.partition("@")[2]
content = json.dumps([name.partition("@")[0], params["variants"].get(variant), params["model"]["source"]])
if out != "-":
    Path(out).mkdir(parents=True)
    Path(out, "content.json").write_text(content)
for path in metrics:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    values = {"variant": variant, "seconds": len(content), "layers": {"a": 0.5}}
    # size and score are derived from the variant's settings
    values["size_bytes"] = 1_000_000 * (params["variants"][variant].get("samples") or 16)
    if name.startswith("evaluate"):
        values["contract"] = {"limit": params["evaluation"]["limit"], "tokenizer": {"file": params["model"]["source"]}}
    Path(path).write_text(json.dumps(values))
if name.startswith("evaluate"):
    right = 200 * params["variants"][variant].get("smoothing", 0.8)
    items = [{"item": i, "hash": str(i), "score": float(i * 37 % 200 < right)} for i in range(200)]
    Path(out, "items-quiz.jsonl").write_text("".join(json.dumps(item) + "\\n" for item in items))
if name.startswith("package@"):
    Path(out, "content.json").write_text(json.dumps([params["variants"], params["evaluation"]]))
    digest = hashlib.sha256(Path(out, "content.json").read_bytes()).hexdigest()
    Path(out, "SHA256SUMS").write_text(digest + "  content.json\\n")
if name == "report":
    Path(out, "table.txt").write_text("the table of the field\\n")
    names = [v for v in params["variants"] if v != "base"]
    verdicts = {
        v: {
            "verdict": "pass", "gate": 0.95, "identity": "0" * 64, "size_bytes": 167_000_000,
            "retention": {"mean": 0.97, "low": 0.95, "high": 0.99}, "texts": {"news": {"perplexity": 12.345}},
        }
        for v in names
    }
    Path(out, "transformers").mkdir()
    Path(out, "transformers/summary.json").write_text(json.dumps({"variants": verdicts, "winner": names[0]}))
with open("times.jsonl", "a") as file:
    file.write(json.dumps([name, "end", time.time()]) + "\\n")
"""


@dataclass(frozen=True)
class Toy:
    """The toy pipeline in `root`."""

    root: Path

    @classmethod
    def create(cls, root: Path, *, packaging: bool = False) -> Toy:
        """Create a git and DVC repository in which nothing has run. packaging: add the stages evaluate and package."""
        root.mkdir(parents=True)
        toy = cls(root)
        params = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
        params["variants"] = {name: params["variants"][name] for name in VARIANTS}
        toy.write("params.yaml", "# a comment that must stay\n" + yaml.safe_dump(params, sort_keys=False))
        toy.write("dvc.yaml", DVC_YAML + (PACKAGING if packaging else ""))
        toy.write("stage.py", STAGE)
        toy.write("tasks/__init__.py", TASKS)
        toy.write("tasks/checks/__init__.py", "")
        toy.write("tasks/checks/preflight.py", PREFLIGHT)
        shutil.copy(PROJECT / ".gitignore", root / ".gitignore")
        toy.command("git", "init", "--quiet")
        toy.dvc("init", "--quiet")
        shutil.copy(PROJECT / ".dvc/config", root / ".dvc/config")
        toy.command("git", "add", "--all")
        toy.command("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "start")
        return toy

    def copy(self, root: Path) -> Toy:
        """Copy the state to another folder."""
        shutil.copytree(self.root, root, symlinks=True)
        return Toy(root)

    def run(self, **options: Any) -> dict[str, str]:
        """Run the flow in this process."""
        from flows.optimize import optimize

        return dict(optimize(str(self.root), **options))

    def cli(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `modelpress` in its own process until it ends."""
        return subprocess.run(
            cli_command(*arguments), cwd=self.root, env=cli_env(**env), capture_output=True, text=True, timeout=300
        )

    def call(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `modelpress` in this process: faster than `cli`, for tests that need no separate process."""
        from flows.cli import main

        out, err = StringIO(), StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.root)
            patch.setattr(sys, "argv", ["modelpress", *arguments])
            patch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers)
            for name, value in (TERMINAL | env).items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main()
        status = ended.value.code or 0
        assert isinstance(status, int)
        return subprocess.CompletedProcess(["modelpress", *arguments], status, out.getvalue(), err.getvalue())

    def start_cli(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start `modelpress` in its own session."""
        return self.start(cli_command(*arguments), **env)

    def start(self, command: list[str], **env: str) -> subprocess.Popen[str]:
        """Start a command in its own session."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=cli_env(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def dvc(self, *arguments: str) -> str:
        """Return the output of `dvc ARGUMENTS`, which must succeed. DVC is forked, which saves its imports."""
        command = [sys.executable, "-P", "-m", "dvc", *arguments]
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        with Process(command, self.root, {**os.environ, "PATH": path}, forked=True) as process:
            output = b"".join(process.chunks(300)).decode()
            assert process.wait() == 0, output
        return output

    def command(self, *words: str) -> str:
        """Return the output of a command, which must succeed."""
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        done = subprocess.run(words, cwd=self.root, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def set(self, **values: Any) -> None:
        """Change `section__key=value` in params.yaml."""
        params = yaml.safe_load(self.read("params.yaml"))
        for name, value in values.items():
            *sections, key = name.split("__")
            place = params
            for section in sections:
                place = place[section]
            place[key] = value
        self.write("params.yaml", yaml.safe_dump(params, sort_keys=False))

    def wish(self, stage: str, what: str = "") -> None:
        """Make a stage `fail`, `sleep SECONDS`, lose the network (`away TIMES`), be `killed` or run out of memory
        (`no memory`).

        `wait` makes it wait for the file go-STAGE next to dvc.yaml. The value for `preflight` is its error message.
        """
        self.write(f"wish/{stage}", what)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text, encoding="utf-8")

    def read(self, path: str) -> str:
        return (self.root / path).read_text(encoding="utf-8")

    def times(self) -> list[tuple[str, str, float]]:
        """Start and end of each executed stage, in order."""
        path = self.root / "times.jsonl"
        return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def executed(self) -> list[str]:
        """The executed stages, in order of their start."""
        return [name for name, what, _ in self.times() if what == "start"]

    def mlflow_runs(self, parents: bool = True) -> list[Any]:
        """The runs in the MLflow store that were not deleted: parents or children, oldest first."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.root / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("modelpress")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
        return [run for run in runs if ("mlflow.parentRunId" in run.data.tags) != parents]


def cli_command(*arguments: str) -> list[str]:
    """The command that runs `modelpress` from this source tree."""
    return [sys.executable, "-c", "from flows.cli import main; main()", *arguments]


def cli_env(**env: str) -> dict[str, str]:
    """The environment for `cli_command`."""
    return {**os.environ, "PYTHONPATH": str(PROJECT), **TERMINAL, **env}
