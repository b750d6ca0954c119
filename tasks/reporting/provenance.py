"""Where a result comes from: the machine, the versions, the commit, the data's checksums.

Nothing here changes between two runs of the same work on the same machine: no time, no path, no host's name.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from tasks.hardware import cpu_name, total_memory

# what can change a number; the rest of the environment is in the lock file
LIBRARIES = (
    "torch",
    "transformers",
    "llmcompressor",
    "compressed-tensors",
    "autoawq",
    "lm-eval",
    "datasets",
    "gguf",
    "llama-cpp-python",
    "onnxruntime",
    "onnxruntime-genai",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
)
# what decides a result, of all that a commit holds
CODE = ("tasks", "evals", "params.yaml", "dvc.yaml", "pyproject.toml")


def machine() -> dict[str, Any]:
    """Processor, cores, memory (whole GiB), GPUs, operating system and Python of this machine."""
    return {
        "processor": cpu_name(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(total_memory() / 2**30),
        "gpus": _gpus(),
        "os": _operating_system(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """The installed version of each library that can change a number; None if it is not installed."""
    found: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = None
    return found


def git_state() -> dict[str, Any]:
    """The commit, and whether code or parameters differ from it; both None outside a repository."""
    commit = _output("git", "rev-parse", "HEAD")
    # dvc.lock and metrics change while the pipeline runs: only what decides a result counts
    changed = _output("git", "status", "--porcelain", "--", *CODE) if commit else None
    return {"commit": commit or None, "dirty": None if changed is None else bool(changed)}


def dvc_identity(lock: Path, variants: list[str]) -> dict[str, str]:
    """md5 of each output that the bundle was made from, by path, as dvc.lock has it; empty without dvc.lock.

    Left out: the bundle's own entry, removed variants, and metrics and report, whose bytes hold durations.
    """
    try:
        stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages") or {}
    except (FileNotFoundError, yaml.YAMLError, AttributeError):
        return {}
    outs = {}
    for name, stage in stages.items():
        _, _, variant = name.partition("@")
        if name in ("package", "report") or (variant and variant not in variants):
            continue
        for out in stage.get("outs", ()):
            if not out["path"].startswith("metrics/"):
                outs[out["path"]] = out.get("md5")
    return dict(sorted(outs.items()))


def without_folders(value: Any) -> Any:
    """`value` with every `path:/some/folder/name` in it as `path:name`: a bundle tells nobody's folders."""
    if isinstance(value, dict):
        return {k: without_folders(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(v) for v in value]
    if isinstance(value, str) and value.startswith("path:"):
        return "path:" + Path(value.removeprefix("path:")).name
    return value


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
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
