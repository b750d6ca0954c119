"""`python fork_client.py ARGUMENTS`: the `python` on the path of a guard's command.

For `-m MODULE`, the guard forks a process that runs the module; this client forwards signals to it and ends with its
exit status. For other arguments, the client becomes a normal Python interpreter.
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
    """Ask the guard to fork; if it does not, become a normal Python interpreter."""
    environment = dict(os.environ)
    place = environment.pop(DOOR, "")
    environment["PATH"] = environment.get("PATH", os.defpath).partition(os.pathsep)[2]  # without this client's folder
    if place and len(arguments) > 1 and arguments[0] == "-m":
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as guard:
            asked = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": environment}).encode()
            try:
                guard.connect(place)
                socket.send_fds(guard, [asked], [0, 1, 2])
                stage = guard.recv(64)  # empty if its libraries were imported in a different environment
            except OSError:  # the guard is gone, or the environment is too large for a message
                stage = b""
            if stage:
                _end(_status(guard, int(stage)))
    os.execve(sys.executable, [sys.executable, *arguments], environment)  # noqa: S606 - run the requested command


def _status(guard: socket.socket, stage: int) -> int:
    """Wait for the stage and forward signals to it; return its exit status, negative if a signal ended it."""
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
