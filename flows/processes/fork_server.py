"""`python fork_server.py FOLDER SOCKET`: import the stages' libraries once, then fork every stage from this process.

Starting Python with torch, transformers and lm-eval takes 5 to 10 seconds; a fork takes milliseconds.

    flow -- asks --> fork server -- fork --> guard --> dvc repro --> sh --> python, which is fork_client.py
                                               `------ fork --> the stage, for the client

Like guard.py, the guard starts a new session. It forks its command if that is `python -P -m MODULE`, and the stages
that the command starts with `python -m MODULE`. So all processes of a stage belong to one process group. The server
ends when stdin closes.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from setproctitle import setproctitle

# the stages' imports; if one fails here, the stage that needs it reports the error
LIBRARIES = (
    "numpy",
    "scipy.stats",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "safetensors.torch",
    "compressed_tensors.offload",
    "compressed_tensors.quantization",
    "datasets",
    "lm_eval.api.model",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "matplotlib.pyplot",
    "pydantic",
    "tqdm",
    "dvc.cli",
    "dvc.commands.repro",
    "dvc.repo.reproduce",
    "dvc.stage.run",
    "dvc.dependency",
    "dvc.output",
)
# prefixes of variables that libraries, interpreter and loader read only once, at the start
EARLY = (
    "HF_",
    "TRANSFORMERS_",
    "TORCH",
    "PYTORCH_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "OPENBLAS_",
    "MALLOC_",
    "LD_",
    "PYTHON",
    "MPL",
)
HEEDED = {"PYTHONUNBUFFERED"}  # exception: `_run` makes the output unbuffered anyway
DOOR = "MODELPRESS_DOOR"  # in the environment of a guard's command: the socket of its guard
MESSAGE = 1 << 20  # maximum bytes


@dataclass(frozen=True)
class Request:
    """A request to start a command. files: open file descriptors for the guard or the stage, starting with stdin."""

    arguments: Sequence[str]
    folder: str
    environment: dict[str, str]
    files: Sequence[int]

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            os.close(file)


def main() -> None:
    """Run the server. Forked processes continue here: as a guard, or, forked by a guard, as a stage."""
    ending: list[int] = []  # the stage's exit status, once it has ended
    atexit.register(_leave, ending)  # registered first, so called last
    folder, listener = Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    _name(["fork_server.py", "of", "modelpress"])  # its first call needs the original environment
    sys.path[0] = str(Path(__file__).parents[2])
    from flows.processes.guard import guarded

    for name in [name for name in sys.modules if name.partition(".")[0] == "flows"]:
        del sys.modules[name]  # a stage imports its own checkout's code
    del sys.path[0]
    sys.modules["triton"] = None  # type: ignore[assignment] # only for GPUs; it reports leaks at exit
    for library in LIBRARIES:
        if _orphaned():
            break
        with suppress(Exception):
            importlib.import_module(library)
    del sys.modules["triton"]
    imported.update(_early(os.environ))
    gc.collect()
    gc.freeze()  # otherwise the collector writes to every object, and so copies the memory shared by forks
    connection = _serve(listener)
    listener.close()
    if connection is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        stage = _guard(folder, connection, guarded)
        try:
            _run(stage)
            ending.append(0)
        except SystemExit as leaving:
            ending.append(leaving.code & 0xFF if isinstance(leaving.code, int) else int(leaving.code is not None))
            raise
        except Exception:
            ending.append(1)
            raise


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that must not change after the imports."""
    return {name: value for name, value in environment.items() if name.startswith(EARLY) and name not in HEEDED}


START = _early(os.environ)
imported: dict[str, str] = {}  # the same after the imports, because some libraries set variables


def _suits(environment: Mapping[str, str]) -> bool:
    """Whether the libraries would be imported in the same way in this environment."""
    early = _early(environment)
    return START.items() <= early.items() and early.items() <= START.items() | imported.items()


def _orphaned() -> bool:
    return bool(select.select([0], [], [], 0)[0])


def _serve(listener: socket.socket) -> socket.socket | None:
    """Fork for every connection; return it in the forked process, and None in the server when its owner is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the server does not wait for the guards
    while True:
        watched: list[int | socket.socket] = [0, listener]
        ready, _, _ = select.select(watched, [], [])
        if 0 in ready:
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return connection
        connection.close()


def _guard(folder: Path, connection: socket.socket, guarded: Callable[[Callable[[], int]], int]) -> Request:
    """Run the requested command and exit with it. Returns only in a forked stage's process, with its request.

    Sends on `connection`: this process's id, then the command's exit status.
    """
    os.setsid()
    request = _receive(connection)
    stdin, output, *kept = request.files
    _enter(request, (stdin, output, output))
    _name(["guard.py", *request.arguments])
    place = folder / str(os.getpid())
    stage: Request | None = None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(str(place))
        door.listen()
        connection.sendall(str(os.getpid()).encode())

        def run() -> int:
            nonlocal stage
            status, stage = _command(request.arguments, folder / "bin", door)
            return status

        status = guarded(run)
    if stage is None:
        place.unlink(missing_ok=True)
        with suppress(OSError):
            connection.sendall(str(status).encode())
        os._exit(status)
    connection.close()
    for file in kept:
        os.close(file)
    return stage


def _command(arguments: Sequence[str], programs: Path, door: socket.socket) -> tuple[int, Request | None]:
    """Run a command and fork its stages; return its status and None, or in a stage's process 0 and its request."""
    path = os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, DOOR: door.getsockname()}
    if arguments[:3] == [sys.executable, "-P", "-m"] and _suits(environment):
        command = os.fork()
        if command == 0:
            files = [os.open(os.devnull, os.O_RDONLY), os.dup(1), os.dup(2)]
            return 0, Request(arguments[1:], os.getcwd(), environment, files)
    else:
        command = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, env=environment).pid
    ended = os.pidfd_open(command)
    stages: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> the stage's process id and its client
    while True:
        watched: list[int | socket.socket] = [ended, door, *stages, *(client for _, client in stages.values())]
        ready, _, _ = select.select(watched, [], [])
        if ended in ready:
            return os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]), None
        for end, (process, client) in list(stages.items()):
            if end in ready:
                status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                with suppress(OSError):
                    client.sendall(str(status).encode())
                _forget(stages, end)
            elif client in ready:
                os.kill(process, signal.SIGKILL)  # its client was killed, so end the stage too
        if door in ready:
            client, _ = door.accept()
            request = _receive(client)
            if not _suits(request.environment):
                client.close()  # no answer: the client starts a new interpreter
                request.close()
                continue
            process = os.fork()
            if process == 0:
                client.close()
                os.close(ended)
                for end in list(stages):
                    _forget(stages, end)
                return 0, request
            request.close()
            client.sendall(str(process).encode())
            stages[os.pidfd_open(process)] = process, client


def _run(request: Request) -> None:
    """Run the module in this process like `python -m MODULE`; exceptions and exits propagate."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _enter(request, request.files)
    *options, module = request.arguments[: request.arguments.index("-m") + 2]
    arguments = request.arguments[len(options) + 1 :]
    _name([sys.executable, *request.arguments])
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if "-P" not in options:
        sys.path.insert(0, request.folder)
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
        _use_threads(int(threads))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _leave(ending: Sequence[int]) -> None:
    """Exit a stage without the interpreter's cleanup, which writes to all memory shared by the forks."""
    for status in ending:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _use_threads(count: int) -> None:
    """Set the thread count, which the libraries read from OMP_NUM_THREADS only at import."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(count)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(count)


def _receive(connection: socket.socket) -> Request:
    message, files, _, _ = socket.recv_fds(connection, MESSAGE, 8)
    return Request(**json.loads(message), files=files)


def _enter(request: Request, files: Sequence[int]) -> None:
    """Take over the folder and environment of the request, and `files` as stdin, stdout and stderr."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in {*files}:
        os.close(file)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)


def _forget(stages: dict[int, tuple[int, socket.socket]], end: int) -> None:
    stages.pop(end)[1].close()
    os.close(end)


def _name(words: Sequence[str]) -> None:
    """Set this process's command line, as shown by ps."""
    setproctitle(" ".join(words))


if __name__ == "__main__":
    main()
