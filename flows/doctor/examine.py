"""`modelpress doctor`: check whether this machine can do a run, and name remedies."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from flows.doctor.git_locks import stale_locks
from flows.errors import FlowError
from flows.graph.dvc_state import REMEDY, damage
from flows.graph.params_file import read_settings
from tasks.hardware import available_memory
from tasks.settings import Settings

PATIENCE = 15  # seconds for the package index
DISK_GB = 10.0  # the environment, the built-in model in four forms, and DVC's cache of them
MEMORY_GB = 6.0  # for the built-in model


@dataclass(frozen=True)
class Finding:
    """The result of one check. `note` is a warning, `bad` prevents a run; both have a remedy."""

    subject: str
    level: Literal["ok", "note", "bad"]
    found: str
    remedy: str = ""


def examine(root: Path) -> Iterator[Finding]:
    """Yield findings about this machine and the project in `root`, quick checks first."""
    yield from _versions(root)
    yield _device()
    yield _free_space("memory", available_memory() / 1e9, MEMORY_GB, "close other programs, or lower --jobs")
    yield _free_space("disk", shutil.disk_usage(root).free / 1e9, DISK_GB, "free some space, or move the project")
    yield _writable(root)
    yield from _repository(root)
    try:
        settings = read_settings(root / "params.yaml")
    except FlowError as error:
        yield Finding("params.yaml", "bad", str(error), "fix it; the comments in the file explain every key")
        return
    yield Finding("params.yaml", "ok", f"{len(settings.variants)} variants, for {', '.join(settings.targets)}")
    yield from _sources(root, settings)


def _versions(root: Path) -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding("python", "ok", python)
    lock = root / "requirements.lock"
    if not lock.is_file():
        yield Finding("packages", "note", "no requirements.lock to compare with", "use a clone of the repository")
        return
    pins = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;+]+)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    wrong = []
    for name, wanted in pins.items():
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            installed = "missing"
        if installed != wanted:
            wrong.append(f"{name} is {installed}, not {wanted}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        yield Finding("packages", "bad", "; ".join(wrong[:3]) + more, "run `make install`")
        return
    direct = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")) if pins else {}
    names = re.findall(r"^([A-Za-z0-9-]+)==", "\n".join(_requirements(direct)), re.MULTILINE)
    yield Finding("packages", "ok", f"all {len(pins)} as locked: " + ", ".join(f"{n} {version(n)}" for n in names))


def _requirements(pyproject: dict[str, object]) -> list[str]:
    project = pyproject.get("project")
    if not isinstance(project, dict):
        return []
    return [*project.get("dependencies", []), *project.get("optional-dependencies", {}).get("tasks", [])]


def _device() -> Finding:
    cores = os.cpu_count() or 1
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
        gpus = [line.strip() for line in answer.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError):
        gpus = []
    if gpus:
        return Finding("device", "ok", f"{len(gpus)} GPU: {'; '.join(gpus)}; {cores} CPU cores")
    level: Literal["ok", "note"] = "ok" if cores >= 2 else "note"
    return Finding("device", level, f"no NVIDIA GPU; {cores} CPU cores", "" if cores >= 2 else "expect slow runs")


def _free_space(subject: str, found: float, wanted: float, remedy: str) -> Finding:
    if found >= wanted:
        return Finding(subject, "ok", f"{found:.0f} GB free")
    # it may be enough: the requirement includes the built-in model, which may be finished already
    level: Literal["note", "bad"] = "note" if found >= wanted / 4 else "bad"
    return Finding(subject, level, f"{found:.1f} GB free, {wanted:.0f} GB advised", remedy)


def _writable(root: Path) -> Finding:
    places = [
        root,
        *(root / name for name in ("models", "data", "exports", "results", "report", "dist", ".dvc")),
    ]
    locked = [str(place) for place in places if place.exists() and not os.access(place, os.W_OK)]
    if locked:
        return Finding("folders", "bad", f"cannot write to {', '.join(locked)}", "fix the permissions")
    return Finding("folders", "ok", f"{root} can be written")


def _repository(root: Path) -> Iterator[Finding]:
    try:
        subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, timeout=PATIENCE, check=True)
        yield Finding("git", "ok", "a repository with commits")
    except (OSError, subprocess.SubprocessError):
        yield Finding("git", "bad", f"{root} has no git commit, or git is missing", "install git; use a clone")
    else:
        for lock in stale_locks(root):
            yield Finding("git lock", "note", f"{lock} was left by a killed git: git cannot commit", REMEDY)
    problems = list(damage(root))
    yield from (Finding("dvc", "bad", problem) for problem in problems)
    if not problems:
        yield Finding("dvc", "ok", "dvc.lock and locks are sound")


def _sources(root: Path, settings: Settings) -> Iterator[Finding]:
    """Check only the indexes and hubs that the configured sources need."""
    data = {**settings.calibration.sources, **settings.evaluation.sources, **settings.evaluation.texts}
    sources = [settings.model.source, *(source.source for source in data.values())]
    there = (root / "models/source").is_dir() and (root / "data/raw").is_dir()
    level: Literal["note", "bad"] = "note" if there else "bad"
    for path in sorted({s.removeprefix("path:") for s in sources if s.startswith("path:")}):
        if not (root / Path(path).expanduser()).exists():
            yield Finding("source", "bad", f"path:{path} does not exist", "fix the path in params.yaml")
    wheels = sorted({s.removeprefix("wheel:").partition("/")[0] for s in sources if s.startswith("wheel:")})
    if wheels:
        yield _index(wheels, level)
    if any(s.startswith("hf:") for s in sources):
        yield _hub(level)


def _index(wheels: list[str], level: Literal["note", "bad"]) -> Finding:
    """Check that pip's configured index has the packages with the model and the data."""
    for wheel in wheels:
        name, _, wanted = wheel.partition("==")
        command = [
            sys.executable,
            "-m",
            "pip",
            "index",
            "versions",
            name,
            "--pre",
            "--retries",
            "0",
            "--timeout",
            "5",
        ]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except subprocess.TimeoutExpired:
            return Finding("package index", level, f"no answer in {PATIENCE} s", "fix the network or pip's settings")
        if answer.returncode:
            words = answer.stderr.strip().splitlines() or ["no error message"]
            return Finding("package index", level, f"{name}: {words[-1]}", "fix the network or pip's settings")
        if wanted not in re.findall(r"[^\s,()]+", answer.stdout):
            return Finding("package index", level, f"{name} has no version {wanted}", "change it in params.yaml")
    return Finding("package index", "ok", f"has {', '.join(wheels)}")


def _hub(level: Literal["note", "bad"]) -> Finding:
    from huggingface_hub import constants

    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    try:
        with urllib.request.urlopen(endpoint, timeout=5):  # noqa: S310 - the user's own setting
            pass
    except urllib.error.HTTPError:
        pass  # any response is enough
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding("model hub", level, f"{endpoint}: {reason}", "fix the network, or set HF_ENDPOINT")
    return Finding("model hub", "ok", f"{endpoint} answers")
