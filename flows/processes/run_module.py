"""Run a Python program to its end: its environment, its exit status, and the line that says why it failed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_module(root: Path, module: str, *arguments: str, own: bool = False) -> tuple[int, list[str]]:
    """Run `python -m MODULE ARGUMENTS` in `root`; its status and its lines.

    own: the module is one of the checkout `root`; others must not be taken from there.
    """
    done = subprocess.run(
        [sys.executable, *([] if own else ["-P"]), "-m", module, *arguments],
        cwd=root,
        env=stage_environment(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


def error_line(lines: list[str], status: int) -> str:
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
