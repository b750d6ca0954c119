"""A Python program that is run to its end, silent: its exit status and what it said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flows.words import stage_environment


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
