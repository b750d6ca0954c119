"""A model or a data file on this machine: copied, never changed or linked to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tasks.companion_files import small_files
from tasks.errors import TaskError
from tasks.sources.address import LocalAddress
from tasks.sources.choice import read_index, weight_files
from tasks.sources.files import Fetched, check_pin


def fetch_file(address: LocalAddress, expected: str | None) -> Fetched:
    """Return the file at the path; TaskError if there is none."""
    path = present(address)
    if not path.is_file():
        raise TaskError(f"path:{address.path} is a folder, expected one file; name a file in it")
    return Fetched("path", None, check_pin(path, expected, f"path:{address.path}"), path, own=True)


def fetch_model(address: LocalAddress, expected: str | None, check: Callable[[dict[str, Path]], None]) -> Fetched:
    """Return the model files in the folder at the path, or the GGUF file."""
    path, where = present(address), f"path:{address.path}"
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise TaskError(f"{where} is a single file, which must be a .gguf")
        return fetch_file(address, expected)
    if expected is not None:
        raise TaskError(f"sha256 cannot be given for {where}: it is a folder; set it to null")
    names = [p.name for p in path.iterdir() if p.is_file()]
    files = {name: path / name for name in small_files(names)}
    weights = weight_files(names, where, read_index(files))
    check(files)
    return Fetched("path", None, None, None, files | {n: path / n for n in weights}, own=True)


def present(address: LocalAddress) -> Path:
    """The path; TaskError if nothing is there."""
    if not address.path.exists():
        raise TaskError(
            f"path:{address.path} not found (looked at {address.path.absolute()}); a relative path is "
            "relative to the project's folder"
        )
    return address.path
