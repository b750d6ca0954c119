"""The form that starts a run: its choices, and the changes to params.yaml that they make.

Names and defaults come from params.yaml in the current folder, so an unchanged form changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from flows.errors import FlowError
from flows.graph.params_file import read_settings
from tasks.settings import BASE, TARGETS, Settings

_HERE = Path.cwd()
ROOT = _HERE if (_HERE / "params.yaml").is_file() else Path(__file__).resolve().parents[1]
NOW = read_settings(ROOT / "params.yaml")


def _choice(name: str, values: Sequence[str]) -> Any:
    """A drop-down with these values."""
    return Enum(name, {value: value for value in values}, type=str)


VARIANTS = [name for name in NOW.variants if name != BASE]
TASKS = list(dict.fromkeys([*NOW.evaluation.tasks, *sorted(path.stem for path in (ROOT / "evals").glob("*.yaml"))]))
VariantName = _choice("VariantName", VARIANTS)
TaskName = _choice("TaskName", TASKS)
TargetName = _choice("TargetName", TARGETS)


def changes(
    settings: Settings,
    *,
    model: str,
    package: str,
    variants: Sequence[str],
    tasks: Sequence[str],
    targets: Sequence[str],
    values: dict[str, Any],
    others: Sequence[str],
) -> list[str]:
    """The form's choices as KEY=VALUE, where they differ from `settings`.

    values: numbers and names by key; others: the user's further changes as KEY=VALUE. FlowError names a field with an
    invalid value.
    """
    if not variants:
        raise FlowError(f"variants: none selected; choose at least one of {', '.join(VARIANTS)}")
    if not targets:
        raise FlowError(f"targets: none selected; choose at least one of {', '.join(TARGETS)}")
    if not tasks:
        raise FlowError(f"tasks: none selected; choose at least one of {', '.join(TASKS)}")
    found = [f"~variants.{name}" for name in settings.variants if name not in (BASE, *variants)]
    if model != settings.model.source:
        # checksum and licence belong to the model in params.yaml
        found += [f"model.source={model}", "model.sha256=null", "model.licence=null"]
        package = package if package != settings.package.name else _slug(model)
    values = {**values, "package.name": package}
    now = settings.model_dump()
    found += [f"{key}={_text(value)}" for key, value in values.items() if value != _at(now, key)]
    if list(tasks) != settings.evaluation.tasks:
        found.append(f"evaluation.tasks=[{','.join(tasks)}]")
    if list(targets) != settings.targets:
        found.append(f"targets=[{','.join(targets)}]")
    return [*found, *others]


def check_reach(settings: Settings, trusted: Settings) -> None:
    """FlowError if a source outside `trusted` (the committed params.yaml) is a path outside the workspace.

    A request from a browser must not read the server's files; params.yaml names the folders that runs may use.
    """
    known = set(_sources(trusted))
    for source in _sources(settings):
        path = source.removeprefix("path:")
        outside = PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or path.startswith("~")
        if source.startswith("path:") and outside and source not in known:
            raise FlowError(
                f"{source} is outside the run's workspace; folders of the server must be in the committed "
                "params.yaml; use hf: or wheel: here"
            )


def _sources(settings: Settings) -> Iterator[str]:
    yield settings.model.source
    groups: tuple[dict[str, Any], ...] = (
        dict(settings.calibration.sources),
        dict(settings.evaluation.sources),
        dict(settings.evaluation.texts),
    )
    for group in groups:
        yield from (source.source for source in group.values())


def _slug(model: str) -> str:
    """Derive a package's name from a model's source."""
    last = re.split(r"[/:]", model.partition("@")[0].rstrip("/"))[-1]
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:40].strip("-") or "model"


def _at(values: dict[str, Any], key: str) -> Any:
    place: Any = values
    for part in key.split("."):
        place = place[part]
    return place


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
