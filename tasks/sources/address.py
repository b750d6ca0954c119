"""Parse the sources of models and data sets in params.yaml. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FORMS = (
    "write hf:organisation/name@revision (for one file of it add /path/to/file), path:/a/folder/or/file, "
    "or wheel:package==version/member"
)

_HUB = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>refs/(?:pr|convert)/[^/\s]+|[^/\s]+)(?:/(?P<file>\S.*))?"
)
_WHEEL = re.compile(r"(?P<package>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.!+-]*)/(?P<member>.+)", re.ASCII)


@dataclass(frozen=True)
class HubAddress:
    """`hf:organisation/name@revision`, with `/path/in/repository` for a single file."""

    repository: str
    revision: str
    file: str | None


@dataclass(frozen=True)
class LocalAddress:
    """`path:/a/folder/or/file`; a relative path is relative to the project's folder."""

    path: Path


@dataclass(frozen=True)
class WheelAddress:
    """`wheel:package==version/member`: a file inside a Python wheel."""

    package: str
    version: str
    member: str


Address = HubAddress | LocalAddress | WheelAddress


def parse(source: str) -> Address:
    """Parse a source; ValueError naming the valid forms."""
    scheme, colon, rest = source.partition(":")
    if colon and scheme == "hf":
        if match := _HUB.fullmatch(rest):
            return HubAddress(**match.groupdict())
        if re.fullmatch(r"[\w.-]+/[\w.-]+(/.*)?", rest):
            raise ValueError(f"{source!r} names no revision; add @ and a commit, tag or branch, such as @main")
        raise ValueError(f"{source!r} is not hf:organisation/name@revision")
    if colon and scheme == "path":
        if rest.strip():
            return LocalAddress(Path(rest).expanduser())
        raise ValueError(f"{source!r} names no path; {FORMS}")
    if colon and scheme == "wheel":
        if match := _WHEEL.fullmatch(rest):
            return WheelAddress(**match.groupdict())
        raise ValueError(f"{source!r} is not wheel:package==version/member, with an exact version after ==")
    raise ValueError(f"{source!r} is not a source; {FORMS}")


def check_model_source(source: str) -> str:
    """Return `source`; ValueError if it cannot be a model."""
    match parse(source):
        case HubAddress(file=str(name)) | WheelAddress(member=name) if not name.lower().endswith(".gguf"):
            raise ValueError(f"{source!r} is a single file, which must be a .gguf")
    return source


def check_data_source(source: str) -> str:
    """Return `source`; ValueError if it cannot be a data file."""
    match parse(source):
        case HubAddress(file=None):
            raise ValueError(f"{source!r} names no file; add a path in the data set, such as /data/test.jsonl")
    return source


def check_model_checksum(source: str, sha256: str | None) -> None:
    """ValueError if `sha256` is given for a source that is not a single file."""
    match parse(source):
        case HubAddress(file=None) if sha256 is not None:
            raise ValueError(
                f"sha256 cannot be given for {source!r}: each file of a repository is checked "
                "against the hub's checksum; set it to null, and pin the model with a commit after the @"
            )
