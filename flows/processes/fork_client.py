"""`python fork_client.py ARGUMENTS`: what a guard's command finds as `python`.

`-m MODULE` is run by a process that the guard forks; this one passes on signals and ends as that one ends. Whatever
else Python is asked for, it runs itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence

DOOR = "MODELPRESS_DOOR"  # as in fork_server.py


def main(arguments: Sequence[str]) -> None:
    """Ask the guard, else become Python itself."""
    environment = dict(os.environ)
    place = environment.pop(DOOR, "")
    environment["PATH"] = environment.get("PATH", os.defpath).partition(os.pathsep)[2]  # without this client's folder
    if place and len(arguments) > 1 and arguments[0] == "-m":
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as guard:
            asked = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": environment}).encode()
            try:
                guard.connect(place)
                socket.send_fds(guard, [asked], [0, 1, 2])
                stage = guard.recv(64)  # nothing where this environment is another than the one of its libraries
            except OSError:  # the guard is gone, or the environment is too long for a message
                stage = b""
            if stage:
                _end(_status(guard, int(stage)))
    os.execve(sys.executable, [sys.executable, *arguments], environment)  # noqa: S606 - it becomes what was asked for


def _status(guard: socket.socket, stage: int) -> int:
    """The stage's exit status, negative for a signal that ended it; signals that come meanwhile are sent on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(stage, number))
    return int(guard.recv(64) or -signal.SIGKILL)


def _end(status: int) -> None:
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
