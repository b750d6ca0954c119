"""`python -I guard.py GROUP`: end the process group GROUP when stdin closes.

Stdin is a pipe held only by the process that started a server, so it closes when that process ends, even by `kill -9`.
The server is in a group of its own, which nothing else would end then. Imports only the standard library.
"""

import os
import signal
import sys
import time
from contextlib import suppress

GRACE = 10.0  # seconds between SIGTERM and SIGKILL


def main() -> None:
    """Wait for the end of stdin, then end the group."""
    group = int(sys.argv[1])
    os.read(0, 1)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        time.sleep(GRACE)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
