"""Where a bundle can be besides a folder of its own: in an OCI image layout, or in a registry. Imports no library."""

from __future__ import annotations

from pathlib import Path

SCHEME = "oci://"  # of an address in a registry
LAYOUT = "oci-layout"  # a file in every OCI image layout


def is_layout(folder: Path) -> bool:
    """Whether a folder is an OCI image layout."""
    return (folder / LAYOUT).is_file()
