"""DVC's remote: copy the configuration of the user's checkout to a workspace, and push a finished run.

Remote and credentials are configured in DVC: `dvc remote add -d NAME URL`.
"""

from __future__ import annotations

import os
from pathlib import Path

from configobj import ConfigObj

from flows.processes.run_module import error_line, run_module

CONFIG = Path(".dvc/config")
LOCAL = Path(".dvc/config.local")  # not in git, so missing in a worktree; may contain credentials


def share_dvc(home: Path, root: Path, cache: Path | str) -> None:
    """Configure the worktree `root` of `home` to use `cache`, and the remotes of `home` with their local settings."""
    config = _read(home / LOCAL)
    config.setdefault("cache", {})["dir"] = str(cache)
    for part in (_read(home / CONFIG), _read(home / LOCAL)):  # the second overrides the first
        for section, values in part.items():
            url = values.get("url", "")
            if section.startswith('remote "') and url and "://" not in url:
                # relative to the configuration file, which is elsewhere in a worktree
                config.setdefault(section, {})["url"] = os.path.normpath(home / ".dvc" / url)
    path = root / LOCAL
    path.touch(mode=0o600)
    path.write_text("\n".join(config.write()) + "\n", encoding="utf-8")


def push(root: Path) -> str | None:
    """Push the checkout `root` to its default remote, if any; return the reason of a failure, otherwise None."""
    status, lines = run_module(root, "dvc", "config", "core.remote")
    if status or not lines:
        return None
    status, lines = run_module(root, "dvc", "push")
    return error_line([line for line in lines if line.startswith("ERROR: ")], status) if status else None


def _read(path: Path) -> ConfigObj:
    return ConfigObj(path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
