"""Calibration and evaluation data at their fixed paths, and refused files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tasks.datasets import datasets
from tasks.errors import TaskError
from tasks.output import checksums
from tasks.settings import CalibrationSource, DataSource, TextSource
from tasks.text.documents import documents
from tests.tiny import Corpus, tiny_corpus

RAW = Path("data/raw")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.chdir(tmp_path)
    return tiny_corpus(Path("corpus"))


def refusal(path: Path, content: bytes, **more: Any) -> str:
    """The error for a file of evaluation items with this content; checks that no files are left."""
    path.write_bytes(content)
    source = DataSource.model_validate({"source": f"path:{path}", "format": "jsonl", **more})
    with pytest.raises(TaskError) as caught:
        datasets({}, {"quiz": source}, {}, RAW)
    assert not RAW.exists()
    assert list(RAW.parent.iterdir()) == []
    return str(caught.value)


def test_every_source_is_one_file_at_its_own_path(corpus: Corpus) -> None:
    reports = datasets(
        {"prose": CalibrationSource(source=f"path:{corpus.text}")},
        {"piqa": DataSource(source=f"path:{corpus.piqa}", format="jsonl")},
        {"news": TextSource(source=f"path:{corpus.news}", format="jsonl", field="document")},
        RAW,
    )
    assert (RAW / "prose/data.txt").read_bytes() == corpus.text.read_bytes()
    assert (RAW / "piqa/data.jsonl").read_bytes() == corpus.piqa.read_bytes()
    written = json.loads((RAW / "sources.json").read_text())
    assert list(written) == sorted(reports)
    digest = hashlib.sha256(corpus.news.read_bytes()).hexdigest()
    assert written["news"] == {
        "source": f"path:{corpus.news}",
        "revision": None,
        "pin": digest,
        "sha256": digest,
        "bytes": corpus.news.stat().st_size,
        "file": "news/data.jsonl",
        "replaced": 0,
    }
    assert corpus.text.stat().st_nlink == 1


def test_a_parquet_file(corpus: Corpus) -> None:
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), "some.parquet")
    source = CalibrationSource(source="path:some.parquet", format="parquet", field="text")
    datasets({"some": source}, {}, {}, RAW)
    assert parquet.read_table(RAW / "some/data.parquet").num_rows == 2
    with pytest.raises(TaskError, match=r"no column 'body'; there are: text"):
        datasets({"some": source.model_copy(update={"field": "body"})}, {}, {}, RAW)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "holds no records"),
        (b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        (b'{"a": 1}\n\n[1]\n', "line 3 is JSON, but not an object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "line 2 is not UTF-8"),
    ],
)
def test_a_file_that_does_not_parse_is_refused_by_line(corpus: Corpus, content: bytes, said: str) -> None:
    message = refusal(Path("quiz.jsonl"), content)
    assert said in message
    assert message.startswith("quiz (path:quiz.jsonl): ")


def test_a_byte_order_mark_is_removed(corpus: Corpus) -> None:
    Path("quiz.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "one"}\n{"a": "two"}\n')
    Path("prose.txt").write_bytes(b"\xef\xbb\xbfOnce.")
    quiz, prose = DataSource(source="path:quiz.jsonl", format="jsonl", field="a"), DataSource(source="path:prose.txt")
    reports = datasets({}, {"quiz": quiz, "prose": prose}, {}, RAW)
    assert list(documents(RAW, "quiz", quiz)) == ["one", "two"]
    assert (RAW / "prose/data.txt").read_bytes() == b"Once."
    assert reports["prose"].sha256 == hashlib.sha256(b"Once.").hexdigest()
    assert reports["prose"].pin == hashlib.sha256(b"\xef\xbb\xbfOnce.").hexdigest()


def test_half_characters_are_replaced_and_counted(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    whole = b'{"a": "\\ud83d\\ude00"}\n'
    Path("quiz.jsonl").write_bytes(whole + b'{"a": "x\\ud83d", "b": ["\\uDE00y"]}\n')
    quiz = DataSource(source="path:quiz.jsonl", format="jsonl", field="a")
    reports = datasets({}, {"quiz": quiz}, {}, RAW)
    assert reports["quiz"].replaced == 2
    assert "quiz: 2 half characters" in capsys.readouterr().out
    assert list(documents(RAW, "quiz", quiz)) == ["\U0001f600", "x\ufffd"]
    assert (RAW / "quiz/data.jsonl").read_bytes().startswith(whole)


def test_text_must_be_utf_8(corpus: Corpus) -> None:
    assert "line 2 is not UTF-8" in refusal(Path("latin.txt"), b"one\ncaf\xe9\n", format="text")


def test_a_field_that_no_record_has_is_refused(corpus: Corpus) -> None:
    assert "no record has the field 'b'; there are: a" in refusal(Path("quiz.jsonl"), b'{"a": 1}\n', field="b")


def test_invalid_parquet_is_refused(corpus: Corpus) -> None:
    assert "not Parquet" in refusal(Path("some.parquet"), b"PAR1 but no more", format="parquet")


def test_another_checksum_is_refused(corpus: Corpus) -> None:
    said = refusal(Path("quiz.jsonl"), b'{"a": 1}\n', sha256="0" * 64)
    assert hashlib.sha256(b'{"a": 1}\n').hexdigest() in said


def test_a_folder_is_no_data_file(corpus: Corpus) -> None:
    with pytest.raises(TaskError, match="is a folder"):
        datasets({"all": CalibrationSource(source="path:corpus")}, {}, {}, RAW)


def test_failed_source_leaves_the_destination_unchanged(corpus: Corpus) -> None:
    good = CalibrationSource(source=f"path:{corpus.text}")
    datasets({"prose": good}, {}, {}, RAW)
    before = checksums(RAW)
    with pytest.raises(TaskError):
        datasets({"prose": good, "more": CalibrationSource(source="path:absent.txt")}, {}, {}, RAW)
    assert checksums(RAW) == before
