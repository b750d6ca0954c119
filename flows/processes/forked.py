"""The owner's side of fork_server.py: start it when it is first needed, and have it start commands."""

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
SHARED = "MODELPRESS_FORK_SERVER"  # the socket of a server that is there, for all processes that find this variable
OFF = "0"

_lock = threading.Lock()
_own: ForkServer | None = None


class ForkServer:
    """A process that has imported what stages import. It ends with this process, however that ends."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="modelpress-"))  # which nobody else may enter
        client = self.folder / "bin/python"
        client.parent.mkdir()
        client.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SE "{CLIENT}" "$@"\n')
        client.chmod(0o700)
        self.address = self.folder / "server"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self.address))
            listener.listen(64)  # those who connect while it imports wait
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
        """End it; what it has forked goes on."""
        atexit.unregister(self.close)
        self._popen.kill()
        self._popen.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Forked:
    """A command under a guard that the fork server forked; used like a `subprocess.Popen`."""

    def __init__(
        self, address: str, command: Sequence[str], folder: Path, environment: dict[str, str], keep: Collection[int]
    ) -> None:
        self._guard = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._status: int | None = None
        environment = {**ENVIRONMENT, **environment}  # as a stage would set it, but before libraries are imported
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
        """Its exit status; None while it runs."""
        if self._status is None and select.select([self._guard], [], [], 0)[0]:
            self.wait()
        return self._status

    def wait(self) -> int:
        """Its exit status, as a shell gives it; 137 where the guard itself was killed."""
        if self._status is None:
            try:
                self._status = int(self._guard.recv(64) or 137)
            except ConnectionError:
                self._status = 137
            self._guard.close()
        return self._status


def fork_server() -> str | None:
    """The address of a fork server, started if there is none; None where stages cannot be forked.

    CUDA cannot be used in a fork of a process that has asked for its devices, which some libraries do when they are
    imported.
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
