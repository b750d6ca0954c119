"""The origin of a result: machine, library versions, commit and checksums of the data.

Repeating the same work on the same machine gives the same values: there are no times, paths or host names.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from tasks.environments import is_made, locked
from tasks.hardware import cpu_cores, cpu_name, total_memory

# libraries that can change a result; the lock file has the rest of the environment
LIBRARIES = (
    "torch",
    "transformers",
    "llmcompressor",
    "compressed-tensors",
    "autoawq",
    "lm-eval",
    "datasets",
    "gguf",
    "onnxruntime",
    "onnxruntime-genai",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
)
ENGINES = {"llama-cpp-python": "llama-cpp"}  # of them, those in an environment of their own alone, and its name
# files in git that can change a result
CODE = ("tasks", "evals", "params.yaml", "dvc.yaml", "pyproject.toml")


def machine() -> dict[str, Any]:
    """Processor, cores, memory (whole GiB), GPUs, operating system and Python of this machine."""
    return {
        "processor": cpu_name(),
        "architecture": platform.machine(),
        "cores": cpu_cores(),
        "memory_gib": round(total_memory() / 2**30),
        "gpus": _gpus(),
        "os": _operating_system(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """The installed version of each library that can change a result; None if it is not installed."""
    found: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = None
    return found | {library: locked(name)[library] if is_made(name) else None for library, name in ENGINES.items()}


def git_state() -> dict[str, Any]:
    """The commit, and whether code or parameters differ from it; both None outside a repository."""
    commit = _output("git", "rev-parse", "HEAD")
    # only files that can change a result: dvc.lock and metrics change while the pipeline runs
    changed = _output("git", "status", "--porcelain", "--", *CODE) if commit else None
    return {"commit": commit or None, "dirty": None if changed is None else bool(changed)}


def dvc_identity(lock: Path, target: str, variants: list[str]) -> dict[str, str]:
    """The md5 in dvc.lock of each output that went into the bundle, by path; empty without dvc.lock.

    Excluded: bundles, other targets, removed variants, and metrics and report, because they contain durations.
    """
    try:
        stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages") or {}
    except (FileNotFoundError, yaml.YAMLError, AttributeError):
        return {}
    outs = {}
    for name, stage in stages.items():
        kind, _, of = name.partition("@")
        if kind in ("package", "report") or (of and not {of, of.removeprefix(f"{target}-")} & {target, *variants}):
            continue
        for out in stage.get("outs", ()):
            if not out["path"].startswith("metrics/"):
                outs[out["path"]] = out.get("md5")
    return dict(sorted(outs.items()))


def without_folders(value: Any) -> Any:
    """Replace every `path:/some/folder/name` in `value` by `path:name`, because a bundle must not reveal folders."""
    if isinstance(value, dict):
        return {k: without_folders(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(v) for v in value]
    if isinstance(value, str) and value.startswith("path:"):
        return "path:" + Path(value.removeprefix("path:")).name
    return value


def _output(*command: str) -> str | None:
    """The output of a command; None if it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _gpus() -> list[str]:
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return [line.strip() for line in names.splitlines()] if names else []
