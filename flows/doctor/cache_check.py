"""Verify DVC's cache: an object's name is the md5 of its bytes.

DVC trusts a read-only object without a check, and the files in checkouts are links to it. So a write through one link,
or a disk error, silently damages all of them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

OBJECTS = Path("files/md5")  # in the cache
ASIDE = frozenset({".git", ".venv"})  # skipped folders: many files, no outputs
_FOLDER = re.compile(r"[0-9a-f]{2}")
_NAME = re.compile(r"[0-9a-f]{30}(\.dir)?")

Progress = Callable[[int, int], None]  # bytes read, total bytes


def damaged_objects(cache: Path, progress: Progress) -> list[Path]:
    """The objects of the cache whose bytes do not match their name."""
    sizes = {path: path.stat().st_size for path in _objects(cache)}
    total, read = sum(sizes.values()), 0
    damaged = []
    for path, size in sizes.items():
        if _md5(path) != path.parent.name + path.name.removesuffix(".dir"):
            damaged.append(path)
        read += size
        progress(read, total)
    return damaged


def links_to(root: Path, objects: Collection[Path], cache: Path) -> list[Path]:
    """The hard and symbolic links below `root` to one of the objects, outside the cache."""
    if not objects:
        return []
    same = {(found.st_dev, found.st_ino) for found in (path.stat() for path in objects)}
    return [path for path in _files(root, cache.resolve()) if _identity(path) in same]


def _objects(cache: Path) -> Iterator[Path]:
    for folder in sorted((cache / OBJECTS).glob("??")):
        if _FOLDER.fullmatch(folder.name) and folder.is_dir():
            yield from (path for path in sorted(folder.iterdir()) if _NAME.fullmatch(path.name) and path.is_file())


def _files(root: Path, cache: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in ASIDE and Path(place, name).resolve() != cache]
        # DVC does not link folders
        yield from (Path(place, name) for name in files)


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a link's target; None if it is dangling."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
