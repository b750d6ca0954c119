"""llama.cpp's own server: compiled once from the source that llama-cpp-python ships, and its command line.

    python -m tasks.serving.llama_server

compiles it and prints the program's path. Compilation takes 10 to 30 minutes of processor time; the result is kept in
~/.cache/modelpress/environments and used again by the same processor type.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from tasks.environments import environments
from tasks.errors import TaskError, TransientError
from tasks.hardware import cpu_cores, cpu_name, stage_threads
from tasks.output import CODE
from tasks.program import one_line_errors

LOCK = CODE.parent / "locks" / "llama-server.lock"
PROGRAM, LOG = "llama-server", "build.log"
# the programs and what Debian calls their packages
_TOOLS = {"cmake": ("cmake",), "g++": ("c++", "g++", "clang++"), "make": ("make",)}
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",  # one file
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # otherwise the build downloads it
    "LLAMA_OPENSSL": "OFF",  # the server fetches nothing
}
_PERCENT = re.compile(r"^\[ *(\d+)%\]")
_LAST_WORDS = 300  # characters of a log in an error message


@dataclass(frozen=True)
class Serving:
    """Settings of one server process.

    name: the model's name for clients. context: tokens for each request; None: the model's own length. slots: requests
    answered at once, each with the full context. key_file: a file with API keys, one per line; None: no key is asked
    for. threads: None: those of this stage.
    """

    name: str
    port: int = 8080
    host: str = "127.0.0.1"
    context: int | None = None
    slots: int = 4
    key_file: Path | None = None
    threads: int | None = None


def server_command(program: Path, model: Path, serving: Serving) -> list[str]:
    """The command that serves one GGUF file, with the template of the file and Prometheus metrics."""
    return [str(program), *server_arguments(model, serving), "--host", serving.host, "--port", str(serving.port)]


def server_arguments(model: Path, serving: Serving) -> list[str]:
    """The arguments that serve one GGUF file, without the address."""
    context = serving.context or 0  # of all slots together
    return [
        *("--model", str(model), "--alias", serving.name),
        *("--ctx-size", str(context * serving.slots), "--parallel", str(serving.slots)),
        # otherwise the slots share a cache, and a long request takes the room of the others
        *(("--no-kv-unified",) if context else ("--kv-unified",)),
        *("--threads", str(serving.threads or stage_threads())),
        *("--jinja", "--metrics", "--no-webui", "--no-slots", "--offline"),
        *(("--api-key-file", str(serving.key_file)) if serving.key_file else ()),
    ]


def llama_server(cache: Path | None = None, progress: str = "llama.cpp's server") -> Path:
    """The path of the compiled server; compiles it first if needed, one process at a time.

    cache: default: that of all environments (environments.py). progress: the label of the progress bar; empty for none.
    TaskError if a tool is missing or the build fails, TransientError if the source cannot be fetched; the log stays in
    the folder that the message names.
    """
    cache = cache or environments()
    folder = cache / f"llama-server-{_identity()}"
    if not (folder / PROGRAM).is_file():
        _check_tools()
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / PROGRAM).is_file():
                _build(folder, progress)
    return folder / PROGRAM


def source_version() -> str:
    """The version of llama-cpp-python whose source holds the server."""
    return str(re.findall(r"==([^ ]+)", LOCK.read_text(encoding="utf-8"))[0])


def _identity() -> str:
    """Hash of everything that the program depends on; the processor, because the code is compiled for this one."""
    pins = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    parts = (*pins, repr(sorted(OPTIONS.items())), platform.platform(), cpu_name())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _check_tools() -> None:
    for package, programs in _TOOLS.items():
        named = os.environ.get("CXX") if package == "g++" else None
        if not any(shutil.which(program) for program in ([named] if named else programs)):
            raise TaskError(
                f"llama.cpp's server is compiled here, but there is no {' or '.join([named] if named else programs)} "
                f"on PATH; install it (on Debian: apt install {package})"
            )


def _build(folder: Path, progress: str) -> None:
    """Fetch, compile, and move the program into place last, so that its existence means that it is complete."""
    folder.mkdir(exist_ok=True)
    log = folder / LOG
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as temporary:
        work = Path(temporary)
        _fetch(work / "sdist", log)
        source = _unpack(work / "sdist", work / "source")
        build = work / "build"
        options = [f"-D{key}={value}" for key, value in OPTIONS.items()]
        _run(["cmake", "-S", str(source), "-B", str(build), "-G", "Unix Makefiles", *options], log)
        command = ["cmake", "--build", str(build), "--target", PROGRAM, "--parallel", str(cpu_cores())]
        with tqdm(total=100, desc=progress, unit="%", disable=not progress) as bar:
            for line in _lines(command, log):
                if found := _PERCENT.match(line):
                    bar.update(max(0, int(found[1]) - bar.n))
        program = build / "bin" / PROGRAM
        _run([str(program), "--version"], log)
        program.chmod(0o755)
        program.replace(folder / PROGRAM)


def _fetch(folder: Path, log: Path) -> None:
    """Download the source archive; pip compares its checksum with the lock file."""
    options = ("--no-deps", "--no-binary", "llama-cpp-python", "--require-hashes", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(LOCK), "--dest", str(folder)]
    try:
        _run(command, log)
    except TaskError as error:
        if "DO NOT MATCH THE HASHES" in log.read_text(encoding="utf-8", errors="replace"):
            raise TaskError(
                f"the source of llama.cpp's server has another checksum than {LOCK.name} expects; see {log}, and "
                "compare your package index with pypi.org"
            ) from error
        raise TransientError(f"the source of llama.cpp's server could not be fetched: {error}") from error


def _unpack(folder: Path, destination: Path) -> Path:
    """Unpack the source archive in `folder`; returns the folder of llama.cpp in it."""
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(destination, filter="data")
    (source,) = destination.glob("*/vendor/llama.cpp")
    return source


def _run(command: Sequence[str], log: Path) -> None:
    for _ in _lines(command, log):
        pass


def _lines(command: Sequence[str], log: Path) -> Iterator[str]:
    """Yield a command's output line by line and append it to the log. TaskError if the command fails."""
    with log.open("a", buffering=1, encoding="utf-8") as file, _process(command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            yield line
        status = process.wait()
    if status:
        last = log.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:]
        raise TaskError(
            f"building llama.cpp's server failed: {command[0]} ended with status {status}: {' '.join(last.split())} "
            f"(the whole log: {log}); correct the cause and run again"
        )


@contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, errors="replace"
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    with one_line_errors():
        print(llama_server())
