"""Outputs that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.errors import TaskError

MANIFEST = "manifest.json"
CODE = Path(__file__).parent  # tasks/: the code of all stages


@contextmanager
def whole_directory(destination: Path, seal: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield an empty directory that becomes `destination` when the body ends without an error.

    What stood at `destination` before stays until that moment, and stays for good if the body fails.
    A manifest with the sha256 of every file is written last, so its existence means that nothing is missing;
    `seal` writes it in another form.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".part", dir=destination.parent))
    try:
        work = scratch / "new"
        work.mkdir()
        yield work
        (seal or write_manifest)(work)
        _put_in_place(work, destination, scratch / "old")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def resumable_directory(destination: Path, key: str) -> Iterator[Path]:
    """As `whole_directory`, but what the body wrote before it failed or was killed is there the next time.

    key: of all that decides what is written, but for the code of the stages, which is seen to here; what was begun
    under another key is thrown away. The body must write each file whole or not at all, and tells by their existence
    what is done. TaskError if that code is not where it should be.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("".join([key, *code_hashes()]).encode()).hexdigest()[:16]
    scratch = destination.parent / f".{destination.name}.{digest}.part"
    for other in destination.parent.glob(f".{destination.name}.*.part"):
        if other != scratch:
            shutil.rmtree(other, ignore_errors=True)
    work = scratch / "new"
    work.mkdir(parents=True, exist_ok=True)
    yield work
    write_manifest(work)
    _put_in_place(work, destination, scratch / "old")
    shutil.rmtree(scratch, ignore_errors=True)


def code_hashes() -> list[str]:
    """sha256 of every file of the stages' code; TaskError if that code is not where it should be."""
    code = [sha256(path) for path in sorted(CODE.rglob("*.py"))]
    if not code:
        raise TaskError(f"{CODE} holds no Python files, so whether the code has changed cannot be told; install anew")
    return code


def _put_in_place(work: Path, destination: Path, aside: Path) -> None:
    """Rename `work` to `destination`; what stands there goes to `aside`."""
    if destination.is_dir() and not destination.is_symlink():
        destination.rename(aside)
    elif destination.exists() or destination.is_symlink():
        destination.unlink()
    work.rename(destination)


def write_manifest(directory: Path) -> None:
    """Write the sha256 of every file below `directory` to its manifest.json."""
    write_json(directory / MANIFEST, {"sha256": checksums(directory)})


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON with sorted keys, whole or not at all; NaN and infinity are refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes private files; results are for everyone whom the umask allows
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def checksums(directory: Path) -> dict[str, str]:
    """sha256 of every file below `directory`, by its path relative to it, sorted; the manifest left out."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {name: sha256(p) for p in files if (name := p.relative_to(directory).as_posix()) != MANIFEST}


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, destination: Path) -> None:
    """Put `source`'s bytes at `destination` without using disk twice where the file system allows it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), destination)
    except OSError:
        shutil.copyfile(source, destination)
