"""`--set key=value`: a change to params.yaml that keeps its comments, refused whole if the result is bad."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.errors import FlowError
from tasks.errors import TaskError
from tasks.settings import Settings, check_settings, load_settings


def read_settings(path: Path) -> Settings:
    """The settings in `path`; FlowError naming each field that is wrong."""
    try:
        return load_settings(path)
    except TaskError as error:
        raise FlowError(str(error)) from error


def override(path: Path, changes: list[str]) -> list[str]:
    """Apply Hydra overrides (`key=value`, `+key=value`, `~key`) to the settings file; returns what changed.

    The result is checked before it takes the file's place; FlowError leaves the file as it was.
    """
    if not changes:
        return []
    read_settings(path)
    for change in changes:
        if "=" not in change and not change.startswith("~"):
            raise FlowError(f"--set {change}: expected KEY=VALUE, or ~KEY to remove one")
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".part{path.suffix}", dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        shutil.copy(path, scratch)
        _apply(scratch, changes)
        after = yaml.safe_load(scratch.read_text(encoding="utf-8"))
        check_settings(after, f"--set {' --set '.join(changes)}")
        if after != before:
            os.replace(scratch, path)
    except TaskError as error:
        raise FlowError(f"{error}; {path.name} is as it was") from error
    finally:
        scratch.unlink(missing_ok=True)
    return list(_differences(before, after))


def _apply(path: Path, changes: list[str]) -> None:
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides

    try:
        apply_overrides(str(path), changes)
    except DvcException as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0]
        raise FlowError(
            f"--set {' --set '.join(changes)}: {reason}; KEY=VALUE changes a key that is there, "
            "+KEY=VALUE adds one, ~KEY removes one"
        ) from error


def _differences(before: Any, after: Any, prefix: str = "") -> Iterator[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(k for k in after if k not in before)]:
            yield from _differences(
                before.get(key, _GONE), after.get(key, _GONE), f"{prefix}.{key}" if prefix else key
            )
    elif before != after:
        yield f"{prefix}: {_show(before)} -> {_show(after)}"


_GONE = object()


def _show(value: Any) -> str:
    return (
        "(none)"
        if value is _GONE
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    )
