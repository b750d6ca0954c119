"""SHA256SUMS: the bytes of a bundle, in the form of `sha256sum -c`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tasks.errors import TaskError
from tasks.output import checksums, sha256, write_text

SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"  # signs SHA256SUMS as well, so it cannot be listed there
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_SHOWN = 5  # faults in a message


def write_sums(bundle: Path) -> None:
    """Write the sha256 of every file below `bundle` to its SHA256SUMS; TaskError for a name that it cannot hold."""
    sums = {file: digest for file, digest in checksums(bundle).items() if file not in (SUMS, SIGNATURE)}
    write_text(bundle / SUMS, "".join(f"{digest}  {file}\n" for file, digest in sums.items()))
    _read_sums(bundle)


def check_sums(bundle: Path) -> dict[str, str]:
    """The sha256 by path of every file below `bundle`, which are exactly those that its SHA256SUMS lists.

    SHA256SUMS itself and a signature are left out. TaskError naming each file that was changed, added, removed or
    renamed, and each link; also if there is no SHA256SUMS or it is not one.
    """
    listed = _read_sums(bundle)
    present, faults = _files(bundle)
    extra = {name: sha256(bundle / name) for name in sorted(present - {*listed, SUMS, SIGNATURE})}
    new_names = {digest: name for name, digest in extra.items()}
    for name, digest in listed.items():
        if name not in present:
            renamed = new_names.get(digest)
            faults.append(f"{name} was renamed to {renamed}" if renamed else f"{name} is missing")
            extra.pop(renamed or "", None)
        elif sha256(bundle / name) != digest:
            faults.append(f"{name} was changed")
    faults += [f"{name} was added" for name in extra]
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise TaskError(
            f"{bundle} does not match its SHA256SUMS: {'; '.join(faults[:_SHOWN])}{more}. "
            "Do not use it; fetch it again from where it was published"
        )
    return listed


def _files(bundle: Path) -> tuple[set[str], list[str]]:
    """The regular files below `bundle` by relative path, and a fault for everything that is neither file nor folder."""
    present, faults = set(), []
    for path in _walk(bundle):
        name = path.relative_to(bundle).as_posix()
        if path.is_symlink():
            faults.append(f"{name} is a symbolic link")
        elif path.is_file():
            present.add(name)
        else:
            faults.append(f"{name} is not a regular file")
    return present, faults


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below `folder` except folders; links are not followed."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))
            else:
                yield Path(entry.path)


def _read_sums(bundle: Path) -> dict[str, str]:
    """The sha256 by path in SHA256SUMS; TaskError unless every line is one and every path stays in the folder."""
    path = bundle / SUMS
    try:
        if path.is_symlink() or not path.is_file():
            raise TaskError(f"{bundle} has no {SUMS}, so it is not a whole bundle; fetch it again")
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text; fetch the bundle again") from error
    listed: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            break
        match = _LINE.fullmatch(line)
        if match is None or not _inside(match[2]) or match[2] in listed:
            raise TaskError(
                f"line {number} of {path} is {line[:120]!r}, expected a sha256 and a new path inside the folder; "
                "fetch the bundle again"
            )
        listed[match[2]] = match[1]
    same = {name.casefold(): name for name in listed}
    if twice := [name for name in listed if same[name.casefold()] != name]:
        raise TaskError(
            f"{path} lists {twice[0]} and {same[twice[0].casefold()]}, which are one file on some systems; "
            "rename one and package again"
        )
    if not listed:
        raise TaskError(f"{path} lists no file; fetch the bundle again")
    return listed


def _inside(name: str) -> bool:
    """Whether a relative path in its shortest form stays in its folder; a backslash separates paths on Windows."""
    path = PurePosixPath(name)
    return name == str(path) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and name != "."
