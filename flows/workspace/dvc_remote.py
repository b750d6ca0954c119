"""DVC's remote: how a private workspace reaches the one of the person's checkout, and how a finished run is sent there.

Which remote, and with what credentials, is DVC's own configuration: `dvc remote add -d NAME URL`.
"""

from __future__ import annotations

import os
from pathlib import Path

from configobj import ConfigObj

from flows.processes.run_module import error_line, run_module

CONFIG = Path(".dvc/config")
LOCAL = Path(".dvc/config.local")  # not in git, so a worktree does not have it: credentials may be in it


def share_dvc(home: Path, root: Path, cache: Path | str) -> None:
    """Let the worktree `root` of `home` use its cache, and its remotes with what only this machine knows of them."""
    config = _read(home / LOCAL)
    config.setdefault("cache", {})["dir"] = str(cache)
    for part in (_read(home / CONFIG), _read(home / LOCAL)):  # the second has the last word
        for section, values in part.items():
            url = values.get("url", "")
            if section.startswith('remote "') and url and "://" not in url:
                # DVC reads it from where the configuration lies, which is elsewhere in a worktree
                config.setdefault(section, {})["url"] = os.path.normpath(home / ".dvc" / url)
    path = root / LOCAL
    path.touch(mode=0o600)
    path.write_text("\n".join(config.write()) + "\n", encoding="utf-8")


def push(root: Path) -> str | None:
    """Send what the checkout `root` holds to its default remote, if it has one; why that failed, if it did."""
    status, lines = run_module(root, "dvc", "config", "core.remote")
    if status or not lines:
        return None
    status, lines = run_module(root, "dvc", "push")
    return error_line([line for line in lines if line.startswith("ERROR: ")], status) if status else None


def _read(path: Path) -> ConfigObj:
    return ConfigObj(path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
