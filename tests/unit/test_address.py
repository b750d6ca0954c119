"""The sources that params.yaml may contain."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.errors import TaskError
from tasks.settings import DataSource, ModelSettings, check_settings
from tasks.sources.address import HubAddress, LocalAddress, WheelAddress, parse


def test_a_hub_repository() -> None:
    assert parse("hf:acme/tiny-1.5B@main") == HubAddress("acme/tiny-1.5B", "main", None)


def test_a_file_on_a_hub() -> None:
    assert parse("hf:acme/data@1a2b/en/test.jsonl") == HubAddress("acme/data", "1a2b", "en/test.jsonl")


@pytest.mark.parametrize("revision", ["refs/pr/7", "refs/convert/parquet"])
def test_a_revision_with_slashes(revision: str) -> None:
    assert parse(f"hf:acme/tiny@{revision}") == HubAddress("acme/tiny", revision, None)
    assert parse(f"hf:acme/data@{revision}/en/test.jsonl") == HubAddress("acme/data", revision, "en/test.jsonl")


def test_a_path() -> None:
    assert parse("path:models/my model") == LocalAddress(Path("models/my model"))


def test_a_path_in_the_home_folder() -> None:
    assert parse("path:~/model") == LocalAddress(Path.home() / "model")


def test_a_member_of_a_wheel() -> None:
    assert parse("wheel:some-pkg==1.0.post1/pkg/a file.txt") == WheelAddress("some-pkg", "1.0.post1", "pkg/a file.txt")


@pytest.mark.parametrize(
    "source",
    [
        *("", "acme/tiny", "s3:bucket/x", "C:\\models", "hf:tiny@main", "hf:acme/tiny@", "path:"),
        *("wheel:pkg==1.0", "wheel:pkg>=1.0/x", "wheel:pkg==1.*/x", "wheel:--index-url==1.0/x", "wheel:pkg==1.0/"),
    ],
)
def test_anything_else_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"is not a source|is not|names no"):
        parse(source)


def test_refusal_names_all_forms() -> None:
    with pytest.raises(ValueError, match="hf:") as caught:
        parse("acme/tiny")
    assert all(form in str(caught.value) for form in ("hf:", "path:", "wheel:"))


def test_a_hub_without_a_revision_says_what_to_add() -> None:
    with pytest.raises(ValueError, match="names no revision; add @"):
        parse("hf:acme/tiny")


def test_a_model_must_be_a_folder_or_a_gguf() -> None:
    with pytest.raises(ValueError, match=r"a single file, which must be a \.gguf"):
        ModelSettings(source="wheel:pkg==1.0/model.bin", dtype="float32")


def test_a_repository_has_no_checksum() -> None:
    with pytest.raises(ValueError, match="sha256 cannot be given"):
        ModelSettings(source="hf:acme/tiny@main", sha256="0" * 64, dtype="float32")


def test_a_data_set_must_name_a_file() -> None:
    with pytest.raises(ValueError, match="names no file"):
        DataSource(source="hf:acme/questions@main")


def test_settings_name_the_field_of_a_bad_source() -> None:
    with pytest.raises(TaskError, match=r"model\.source.*'acme/tiny' is not a source"):
        check_settings({"model": {"source": "acme/tiny", "dtype": "float32"}})
