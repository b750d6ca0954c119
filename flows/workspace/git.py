"""git, with its own reason where it fails."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from flows.errors import FlowError

_UNLOCK = "wait until the git that holds it ends; if it was killed, `modelpress doctor --repair` removes it"


def git(folder: Path, *arguments: str) -> str:
    """What git prints; FlowError with its own reason if it fails."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        if lock := re.search(r"'(/.+/index\.lock)'", done.stderr):
            raise FlowError(f"git {' '.join(arguments[:2])} failed in {folder}: {lock[1]} is in the way; {_UNLOCK}")
        words = (done.stderr.strip() or done.stdout.strip() or "it gave no reason").splitlines()
        raise FlowError(f"git {' '.join(arguments[:2])} failed in {folder}: {words[-1]}")
    return done.stdout.strip()


def git_says(folder: Path, *arguments: str) -> str:
    """What git prints; nothing where it fails."""
    try:
        return git(folder, *arguments)
    except FlowError:
        return ""
