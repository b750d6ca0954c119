"""Stages of a tiny model without the seconds in which each loads the same libraries: forked from one that has them.

`stage_python` makes a Python environment like this one, in whose folder `python -m tasks.STAGE` asks a server to fork.
What is forked does as `python -m` does: the checkout's code, in its folder, environment, input and output.

python -m tests.functional.preloaded serve SOCKET
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def stage_python(folder: Path) -> Iterator[Path]:
    """An environment's Python, beside which programs find `python`: a client of the server, at work in the block."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin/python3"
    python.symlink_to(sys.executable)
    if (described := Path(sys.prefix) / "pyvenv.cfg").exists():  # else this is no environment, but a whole Python
        shutil.copy(described, folder)
    (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
    address = folder / "server"
    client = folder / "bin/python"
    client.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {Path(__file__).resolve()} ask {address} "$@"\n')
    client.chmod(0o755)
    command = [sys.executable, "-m", __name__, "serve", str(address)]
    server = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, start_new_session=True)
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n"
        yield python
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def serve(address: str) -> None:
    """Load what stages load, then fork for each who asks. Nothing of this project is loaded but this module."""
    import datasets  # noqa: F401
    import lm_eval  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _run(connection)
            connection.close()
            while _ended():
                pass


def _ended() -> bool:
    """Whether a child has ended since the last question."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _run(connection: socket.socket) -> None:
    """Run the module that is asked for in this process, and send its exit status."""
    message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    asked = json.loads(message)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    option, module, *arguments = asked["arguments"]
    status = 0
    try:
        if option != "-m":
            sys.exit(f"found {asked['arguments']}, expected -m MODULE")
        sys.path[0] = asked["folder"]
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([status]))
    os._exit(status)


def ask(address: str, *arguments: str) -> None:
    """Let the server run `python ARGUMENTS` here; end with its status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        asked = {"folder": os.getcwd(), "environment": dict(os.environ), "arguments": arguments}
        socket.send_fds(connection, [json.dumps(asked).encode()], [0, 1, 2])
        sys.exit((connection.recv(1) or b"\1")[0])


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:])
