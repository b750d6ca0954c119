"""A model's config.json alone, without its weights."""

from __future__ import annotations

from pathlib import Path

from tasks.sources import hub, local
from tasks.sources.address import HubAddress, LocalAddress, parse
from tasks.sources.files import DOWNLOADS


def fetch_config(source: str, downloads: Path = DOWNLOADS) -> Path | None:
    """The config.json of the model at `source`, fetched if needed; None for a GGUF file or a folder without one.

    TaskError if the path does not exist or the hub has no such repository, revision or file; TransientError if the hub
    cannot be reached. ValueError if `source` is no address.
    """
    match parse(source):
        case LocalAddress() as address:
            config = local.present(address) / "config.json"
            return config if config.is_file() else None
        case HubAddress(repository, revision, None):
            return hub.fetch_file(HubAddress(repository, revision, "config.json"), None, "model", downloads).file
    return None
