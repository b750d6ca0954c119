"""What a stage's program gets from the flow, its environment, and what it gives back, its last word."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping


def last_word(lines: list[str], status: int) -> str:
    """The line of a failed stage's output that says why: its own `error:`, else its last, else DVC's."""
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    chatter = ("ERROR: ", "WARNING: ", "Running stage ", "Updating lock file", "Generating lock file")
    own = [line for line in lines if not line.startswith(chatter)]
    theirs = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    words = own or theirs
    return words[-1] if words else f"ended with status {status}, without a word"


def stage_environment(environ: Mapping[str, str], threads: int | None = None) -> dict[str, str]:
    """The environment of a stage: this Python first on the path, output unbuffered, nobody called at home.

    threads: that it computes with, unless the person has said OMP_NUM_THREADS. More threads than cores, summed over
    the stages that run together, would wait for each other and take many times longer.
    """
    return {
        **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        **environ,
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
    }
