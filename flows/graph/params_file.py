"""`--set key=value`: change params.yaml and keep its comments; reject all changes if the result is invalid."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter

from flows.errors import FlowError
from tasks.errors import TaskError
from tasks.settings import Settings, check_settings, load_settings


def read_settings(path: Path) -> Settings:
    """The settings in `path`; FlowError naming each wrong field."""
    try:
        return load_settings(path)
    except TaskError as error:
        raise FlowError(str(error)) from error


def package_names(text: str, origin: str) -> dict[str, str]:
    """The name of each target's package in the text of a params.yaml, including earlier versions that `read_settings`
    rejects, whose only package was not named after its target.

    FlowError with the `origin` if there is none.
    """
    try:
        values = yaml.safe_load(text)
        name = str(values["package"]["name"])
        if "targets" not in values:
            return {str(values["target"]): name}
        return {str(target): f"{name}-{target}" for target in values["targets"]}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise FlowError(f"{origin} names no package; expected package.name and targets") from error


def package_of(text: str, origin: str, target: str | None) -> str:
    """The name of the package for `target`, or of the only one; FlowError if there is no such or more than one."""
    names = package_names(text, origin)
    if target is None and len(names) > 1:
        raise FlowError(f"{origin} has packages for {', '.join(names)}; choose one with --target")
    if target is not None and target not in names:
        raise FlowError(f"{origin} has no package for {target!r}; there are: {', '.join(names)}")
    return names[target] if target else next(iter(names.values()))


def override(path: Path, changes: list[str]) -> list[str]:
    """Apply Hydra overrides (`key=value`, `+key=value`, `~key`) to the settings file; return the changes.

    The result is validated before it replaces the file; FlowError leaves the file unchanged.
    """
    read_settings(path)
    text = path.read_text(encoding="utf-8")
    before = yaml.safe_load(text)
    with tempfile.TemporaryDirectory() as folder:
        after = _overridden(Path(folder) / path.name, text, changes) if changes else before
    try:
        check_settings(after, f"--set {' --set '.join(changes)}")
    except TaskError as error:
        raise FlowError(f"{error}; {path.name} is unchanged") from error
    if after != before:
        _replace(path, _edited(text, after))
    return list(_differences(before, after))


def _overridden(scratch: Path, text: str, changes: list[str]) -> Any:
    """The values in `text` after the changes, parsed like DVC's `--set-param`."""
    from dvc.exceptions import DvcException

    scratch.write_text(text, encoding="utf-8")
    for change in changes:
        if "=" not in change and not change.startswith("~"):
            raise FlowError(f"--set {change}: expected KEY=VALUE, or ~KEY to remove one")
        if "${" in change:  # Hydra would insert environment variables, including tokens
            raise FlowError(f"--set {change}: ${{...}} is not supported; write the value itself")
        try:
            _apply(scratch, change)
        except DvcException as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
            raise FlowError(
                f"--set {change}: {reason}; KEY=VALUE changes an existing key, +KEY=VALUE adds one, ~KEY removes one"
            ) from error
    return yaml.safe_load(scratch.read_text(encoding="utf-8"))


def _apply(path: Path, change: str) -> None:
    """Apply one override; a value that Hydra cannot parse, such as `wheel:a==1/b`, is plain text."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides
    from hydra.errors import OverrideParseException

    try:
        apply_overrides(str(path), [change])
    except DvcException as error:
        key, equals, value = change.partition("=")
        if not (equals and isinstance(error.__cause__, OverrideParseException)):
            raise
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        apply_overrides(str(path), [f"{key}='{quoted}'"])


def _edited(text: str, values: Any) -> str:
    """Edit `text` only where it differs from `values`."""
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 10_000
    editor.Representer = _Representer
    document = editor.load(text)
    _merge(document, values)
    out = io.StringIO()
    editor.dump(document, out)
    return out.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes an empty value as `null`; a separate class, because DVC configures the base class differently."""


_Representer.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _merge(document: Any, values: Mapping[str, Any]) -> None:
    for key in [key for key in document if key not in values]:
        del document[key]
    for key, value in values.items():
        old = document.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            _merge(old, value)
        elif key not in document or old != value:
            document[key] = _inline(value) if isinstance(value, list) else value


def _inline(value: list[Any]) -> CommentedSeq:
    sequence = CommentedSeq(value)
    sequence.fa.set_flow_style()
    return sequence


def _replace(path: Path, text: str) -> None:
    """Replace the file atomically, keeping its permissions."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        shutil.copymode(path, name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _differences(before: Any, after: Any, prefix: str = "") -> Iterator[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(k for k in after if k not in before)]:
            name = f"{prefix}.{key}" if prefix else key
            yield from _differences(before.get(key, _GONE), after.get(key, _GONE), name)
    elif before != after:
        yield f"{prefix}: {_show(before)} -> {_show(after)}"


_GONE = object()


def _show(value: Any) -> str:
    if value is _GONE:
        return "(none)"
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
