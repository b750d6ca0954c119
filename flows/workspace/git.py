"""Run git; errors carry git's message."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from flows.errors import FlowError

_UNLOCK = "wait for the git process that holds it; if it was killed, `modelpress doctor --repair` removes it"


def git(folder: Path, *arguments: str) -> str:
    """Return git's output; FlowError with git's message if it fails."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        if lock := re.search(r"'(/.+/index\.lock)'", done.stderr):
            raise FlowError(f"git {' '.join(arguments[:2])} failed in {folder}: {lock[1]} exists; {_UNLOCK}")
        words = (done.stderr.strip() or done.stdout.strip() or "no error message").splitlines()
        raise FlowError(f"git {' '.join(arguments[:2])} failed in {folder}: {words[-1]}")
    return done.stdout.strip()


def git_says(folder: Path, *arguments: str) -> str:
    """Return git's output; empty if it fails."""
    try:
        return git(folder, *arguments)
    except FlowError:
        return ""
