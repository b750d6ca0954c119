"""A checkout of the project with a tiny model and corpus, whose real stages take seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import yaml

from flows.processes.process import Process
from tests.functional.toy import PROJECT, cli_command, cli_env
from tests.tiny import Corpus

PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # like an activated environment
ITEMS = 60  # per task; with fewer, a resample may contain no item that the baseline answers
CODE = ("tasks", "flows", "evals", "locks", "dvc.yaml", "pyproject.toml", ".gitignore", ".dvcignore", ".dvc/config")


def params(llama: Path, corpus: Corpus) -> dict[str, Any]:
    """params.yaml with the tiny model and corpus, and tasks that take seconds."""
    values: dict[str, Any] = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    values["model"] |= {"source": f"path:{llama}", "sha256": None, "licence": "Apache-2.0"}
    values["calibration"] |= {
        "samples": 8,
        "sequence_length": 32,
        "overlap": {"ngram": 13, "limit": 1000},  # the tiny corpus repeats itself
        "sources": {"text": {"source": f"path:{corpus.text}", "split": "\n\n"}},
    }
    for name in values["evaluation"]["sources"]:
        values["evaluation"]["sources"][name] = {"source": f"path:{getattr(corpus, name)}", "format": "jsonl"}
    for name, field in (("news", "document"), ("medical", "passage")):
        source = {"source": f"path:{getattr(corpus, name)}", "format": "jsonl", "field": field}
        values["evaluation"]["texts"][name] = source
    values["evaluation"] |= {"limit": ITEMS, "text_tokens": 128, "window": 64}
    for variant in values["variants"].values():
        variant.pop("samples", None)
    values["variants"]["awq-int4"]["group_size"] = 32
    del values["variants"]["gptq-int4"], values["variants"]["auto"]  # slow, and they test nothing more than awq-int4
    values["benchmark"] |= {"prompt_tokens": 8, "new_tokens": 4, "repeats": 1}
    values["gate"] = {"sequential": True, "four_bit": 0.5, "eight_bit": 0.5, "confidence": 0.9, "resamples": 200}
    return values


class Checkout:
    """A checkout of the project with tiny parameters, in which nothing has run."""

    def __init__(self, root: Path, values: dict[str, Any]) -> None:
        self.root = root
        root.mkdir()
        for name in CODE:
            source, target = PROJECT / name, root / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        self.command("git", "init", "--quiet")
        (root / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
        self.command("git", "add", "--all")
        self.command("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "start")

    def command(self, *arguments: str, **env: str) -> str:
        done = subprocess.run(
            arguments,
            cwd=self.root,
            env=cli_env(PATH=PATH, **env),
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def dvc(self, *arguments: str) -> str:
        return self.command(sys.executable, "-P", "-m", "dvc", *arguments)

    def stage(self, name: str, *arguments: str) -> str:
        """Run a single stage's program."""
        command = ["python", "-m", f"tasks.{name}", *arguments]
        with Process(command, self.root, cli_env(PATH=PATH), forked=True) as process:
            output = b"".join(process.chunks(1800)).decode()
            assert process.wait() == 0, f"{command}: {output}"
        return output

    def run(self, *arguments: str, **env: str) -> str:
        """`modelpress run`."""
        return self.command(*cli_command("run", *arguments), **env)

    def stages(self) -> dict[str, list[str]]:
        """Digests of each stage's outputs except metrics, which contain times."""
        lock = yaml.safe_load((self.root / "dvc.lock").read_text(encoding="utf-8"))
        return {
            name: [out["md5"] for out in stage.get("outs", []) if not out["path"].startswith("metrics")]
            for name, stage in lock["stages"].items()
        }

    def runs(self) -> dict[str, int]:
        client = mlflow.MlflowClient(f"sqlite:///{self.root}/mlflow.db")
        found = client.search_runs([e.experiment_id for e in client.search_experiments()])
        parents = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
        return {"parents": len(parents), "children": len(found) - len(parents)}
