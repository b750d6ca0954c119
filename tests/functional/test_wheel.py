"""Files inside Python wheels: fetched by the real pip from a local index, and pip's failures."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from tasks.errors import TaskError, TransientError
from tasks.sources import fetch_file
from tasks.sources.files import DOWNLOADS, Fetched
from tests.untrusted import untrusted_server

SOURCE = "wheel:tiny-texts==1.0/tiny_texts/poems/first.txt"
WHEEL = "tiny_texts-1.0-py3-none-any.whl"
POEM = b"a line\nand another\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local pip index with one wheel; the working directory is a separate project."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder / WHEEL, POEM)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def write_wheel(path: Path, poem: bytes) -> None:
    about = "tiny_texts-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_texts/poems/first.txt", poem)
        wheel.writestr("tiny_texts/poems/second.txt", poem)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/licenses/LICENSE", "do as you like")
        wheel.writestr(f"{about}/RECORD", "")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(source: str = SOURCE, expected: str | None = None) -> Fetched:
    scratch = Path("scratch")
    scratch.mkdir(exist_ok=True)
    return fetch_file(source, expected, scratch)


def refusal(source: str = SOURCE, expected: str | None = None, *, transient: bool = False) -> str:
    with pytest.raises(TaskError) as caught:
        fetch(source, expected)
    # only transient errors are retried
    assert isinstance(caught.value, TransientError) == transient
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept() -> Path:
    return DOWNLOADS / "wheels" / "tiny-texts-1.0" / WHEEL


def test_a_member_is_read_and_the_wheel_is_kept(index: Path) -> None:
    fetched = fetch(expected=sha256(index / WHEEL))
    assert fetched.file is not None
    assert fetched.file.read_bytes() == POEM
    assert (fetched.kind, fetched.revision) == ("wheel", "1.0")
    assert fetched.files["LICENSE"].read_text() == "do as you like"
    assert sha256(kept()) == sha256(index / WHEEL)
    assert [p.suffix for p in kept().parent.iterdir()] == [".whl"]


def test_without_a_checksum_the_one_found_is_given_to_pin(index: Path) -> None:
    assert fetch().pin == sha256(index / WHEEL)


def test_existing_wheel_is_not_fetched_again(index: Path) -> None:
    fetch()
    (index / WHEEL).rename(index / "gone")
    assert fetch("wheel:tiny-texts==1.0/tiny_texts/poems/second.txt").file is not None


def test_partial_download_is_replaced(index: Path) -> None:
    good = sha256(index / WHEEL)
    kept().parent.mkdir(parents=True)
    kept().write_bytes((index / WHEEL).read_bytes()[:100])
    stale = kept().parent / "abc.part"
    stale.mkdir()
    (stale / "half").write_bytes(b"x")

    assert fetch(expected=good).pin == good
    assert sha256(kept()) == good
    assert not stale.exists()


def test_truncated_wheel_is_detected_without_a_checksum(index: Path) -> None:
    kept().parent.mkdir(parents=True)
    kept().write_bytes((index / WHEEL).read_bytes()[:100])
    assert fetch().pin == sha256(index / WHEEL)


def test_another_checksum_is_refused_and_the_wheel_deleted(index: Path) -> None:
    said = refusal(expected="0" * 64)
    assert sha256(index / WHEEL) in said
    assert "0" * 64 in said
    assert not kept().exists()


def test_kept_wheel_that_fails_the_check_is_fetched_again_once(index: Path) -> None:
    write_wheel(index / WHEEL, b"an older poem")
    fetch()
    write_wheel(index / WHEEL, POEM)
    fetched = fetch(expected=sha256(index / WHEEL))
    assert fetched.file is not None
    assert fetched.file.read_bytes() == POEM


def test_missing_member_names_similar_ones(index: Path) -> None:
    said = refusal("wheel:tiny-texts==1.0/tiny_texts/poem/first.txt")
    assert "'tiny_texts/poem/first.txt'" in said
    assert "tiny_texts/poems/first.txt" in said


def test_missing_version_names_the_existing_ones(index: Path) -> None:
    said = refusal("wheel:tiny-texts==9.9/tiny_texts/poems/first.txt")
    assert "tiny-texts==9.9" in said
    assert "1.0" in said.replace("tiny-texts==9.9", "")


def test_missing_package_is_distinguished_from_a_network_failure(index: Path) -> None:
    said = refusal("wheel:tinny-texts==1.0/x.txt")
    assert "has no wheel of tinny-texts==1.0" in said
    assert "network" not in said


def test_no_network_says_what_to_check(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    said = refusal(transient=True)
    assert "check the network" in said
    assert "secret" not in said


def test_failure_leaves_no_partial_files(index: Path) -> None:
    refusal("wheel:tiny-texts==9.9/tiny_texts/poems/first.txt")
    assert list((DOWNLOADS / "wheels" / "tiny-texts-9.9").iterdir()) == []


def test_a_certificate_that_is_not_trusted_is_named_and_not_retried(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with untrusted_server(tmp_path) as address:
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
        with pytest.raises(TaskError, match=r"machine does not trust.*; set PIP_CERT") as caught:
            fetch_file(SOURCE, None, tmp_path)
    assert not isinstance(caught.value, TransientError)
