"""Run a Python program to completion: its environment, exit status and error line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_module(root: Path, module: str, *arguments: str, own: bool = False) -> tuple[int, list[str]]:
    """Run `python -m MODULE ARGUMENTS` in `root`; return its exit status and its output lines.

    own: import the module from the checkout `root`; otherwise nothing is imported from there.
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
    """The error line of a failed stage: its own `error:` line, else its last line, else DVC's error."""
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    chatter = ("ERROR: ", "WARNING: ", "Running stage ", "Updating lock file", "Generating lock file")
    own = [line for line in lines if not line.startswith(chatter)]
    theirs = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    words = own or theirs
    return words[-1] if words else f"ended with status {status} and without output"


def stage_environment(environ: Mapping[str, str], threads: int | None = None) -> dict[str, str]:
    """The environment of a stage: this Python first on the path, unbuffered output, no telemetry.

    threads: the value of OMP_NUM_THREADS, unless the user has set it. If parallel stages together had more threads than
    cores, the threads would wait for each other and the stages would take many times longer.
    """
    return {
        **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        **environ,
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
    }
