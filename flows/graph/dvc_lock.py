"""Read dvc.lock and params.yaml."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def lock_stages(root: Path) -> dict[str, Any]:
    """The stages in dvc.lock; empty if nothing has run."""
    path = root / "dvc.lock"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return dict((content or {}).get("stages") or {})


def lock_hash(root: Path, stages: Mapping[str, object]) -> str:
    """sha256 of the entries of `stages` in dvc.lock, independent of their order."""
    locked = {name: entry for name, entry in lock_stages(root).items() if name in stages}
    return hashlib.sha256(json.dumps(locked, sort_keys=True).encode()).hexdigest()


def params(root: Path) -> dict[str, Any]:
    """The values in params.yaml, unchecked."""
    return dict(yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8")))
