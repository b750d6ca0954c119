"""Atomic outputs: written next to their destination, then renamed into place."""

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
    """Yield an empty directory that replaces `destination` when the body ends without an error.

    Until then, and if the body fails, `destination` is left unchanged. A manifest with the sha256 of every file is
    written last, so its existence means that the output is complete; `seal` writes it in another form.
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
    """Like `whole_directory`, but keep partial output when the body fails or is killed, so that a rerun can resume.

    key: a hash of everything that determines the output except the code of the stages, which is added here; partial
    output under another key is deleted. The body must write each file atomically and skip files that exist.
    TaskError if the code of the stages is not found.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    work = resumable_work(destination, key)
    scratch = work.parent
    for other in destination.parent.glob(f".{destination.name}.*.part"):
        if other != scratch:
            shutil.rmtree(other, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    yield work
    write_manifest(work)
    _put_in_place(work, destination, scratch / "old")
    shutil.rmtree(scratch, ignore_errors=True)


def resumable_work(destination: Path, key: str) -> Path:
    """The directory that `resumable_directory` yields; it may not exist."""
    digest = hashlib.sha256("".join([key, *code_hashes()]).encode()).hexdigest()[:16]
    return destination.parent / f".{destination.name}.{digest}.part" / "new"


def code_hashes() -> list[str]:
    """sha256 of every file of the stages' code; TaskError if that code is not where it should be."""
    code = [sha256(path) for path in sorted(CODE.rglob("*.py"))]
    if not code:
        raise TaskError(f"{CODE} holds no Python files, so code changes cannot be detected; reinstall modelpress")
    return code


def _put_in_place(work: Path, destination: Path, aside: Path) -> None:
    """Rename `work` to `destination`; an existing directory is moved to `aside` first."""
    if destination.is_dir() and not destination.is_symlink():
        destination.rename(aside)
    elif destination.exists() or destination.is_symlink():
        destination.unlink()
    work.rename(destination)


def write_manifest(directory: Path) -> None:
    """Write the sha256 of every file below `directory` to its manifest.json."""
    write_json(directory / MANIFEST, {"sha256": checksums(directory)})


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as readable JSON with sorted keys; NaN and infinity are refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp creates private files; results follow the umask
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
    """The sha256 of every file below `directory` except the manifest, by relative path, sorted."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {name: sha256(p) for p in files if (name := p.relative_to(directory).as_posix()) != MANIFEST}


def sha256(path: Path) -> str:
    """The SHA-256 hex digest of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, destination: Path) -> None:
    """Hard-link `source` to `destination`, or copy it where the file system does not allow links."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), destination)
    except OSError:
        shutil.copyfile(source, destination)
