"""The owner's side of fork_server.py: start the server when it is first needed, and send it commands."""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

from tasks.determinism import ENVIRONMENT

SERVER = Path(__file__).with_name("fork_server.py")
CLIENT = Path(__file__).with_name("fork_client.py")
SHARED = "MODELPRESS_FORK_SERVER"  # environment variable with the socket of a running server, or OFF
OFF = "0"

_lock = threading.Lock()
_own: ForkServer | None = None


class ForkServer:
    """A process that has imported the stages' libraries. It ends with this process, even if this one is killed."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="modelpress-"))  # accessible only to this user
        client = self.folder / "bin/python"
        client.parent.mkdir()
        client.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SE "{CLIENT}" "$@"\n')
        client.chmod(0o700)
        self.address = self.folder / "server"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self.address))
            listener.listen(64)  # connections wait during the imports
            self._popen = subprocess.Popen(
                [sys.executable, str(SERVER), str(self.folder), str(listener.fileno())],
                env={**ENVIRONMENT, **os.environ},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[listener.fileno()],
            )
        atexit.register(self.close)

    def close(self) -> None:
        """End the server; processes that it has forked continue."""
        atexit.unregister(self.close)
        self._popen.kill()
        self._popen.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Forked:
    """A command under a guard forked by the fork server; use it like a `subprocess.Popen`."""

    def __init__(
        self, address: str, command: Sequence[str], folder: Path, environment: dict[str, str], keep: Collection[int]
    ) -> None:
        self._guard = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._status: int | None = None
        environment = {**ENVIRONMENT, **environment}  # stages set these too, but after the libraries are imported
        asked = json.dumps({"arguments": command, "folder": str(folder), "environment": environment}).encode()
        theirs, ours = os.pipe()
        self.stdin = os.fdopen(ours, "wb")
        output, answers = os.pipe()
        self.stdout = os.fdopen(output, "rb")
        try:
            self._guard.connect(address)
            socket.send_fds(self._guard, [asked], [theirs, answers, *keep])
            self.pid = int(self._guard.recv(64) or 0)
        except OSError:
            self.pid = 0
        finally:
            os.close(theirs)
            os.close(answers)
        if not self.pid:
            for part in (self.stdin, self.stdout, self._guard):
                part.close()
            raise ConnectionError(f"the fork server at {address} does not answer")

    def poll(self) -> int | None:
        """The exit status; None while the command runs."""
        if self._status is None and select.select([self._guard], [], [], 0)[0]:
            self.wait()
        return self._status

    def wait(self) -> int:
        """Wait and return the exit status, in the shell's convention; 137 if the guard was killed."""
        if self._status is None:
            try:
                self._status = int(self._guard.recv(64) or 137)
            except ConnectionError:
                self._status = 137
            self._guard.close()
        return self._status


def fork_server() -> str | None:
    """The address of the fork server, started if necessary; None if stages cannot be forked.

    With a GPU they cannot: some libraries query CUDA devices at import, and CUDA then fails in forked processes.
    """
    global _own
    named = os.environ.get(SHARED)
    if named == OFF or not hasattr(os, "pidfd_open") or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))):
        return None
    if named:
        return named
    with _lock:
        if _own is None:
            _own = ForkServer()
        return str(_own.address)
