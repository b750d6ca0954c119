"""Windows of a held-out text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tasks.errors import TaskError
from tasks.scoring.divergence import text_windows
from tasks.settings import TextSource

SOURCE = TextSource(source="path:x", format="jsonl", field="text")
TEXTS = ["Ada paints the lamp of Ben. " * 20, "Cleo sells the map of Dan. " * 20]


def write(folder: Path, rows: list[object]) -> Path:
    (folder / "news").mkdir()
    (folder / "news/data.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


def test_what_is_no_text_is_left_out_and_counted(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    plain = text_windows(tokenizer, write(tmp_path / "plain", [*TEXTS]), "news", SOURCE, 128, 64)
    assert capsys.readouterr().out == ""
    holes = text_windows(tokenizer, write(tmp_path, [None, TEXTS[0], ["None"], TEXTS[1]]), "news", SOURCE, 128, 64)
    assert capsys.readouterr().out.startswith("news: ")
    assert holes == plain


def test_a_text_of_nulls_names_how_many(llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    with pytest.raises(TaskError, match=r"news has 0 tokens \(3 records left out: not a text\), but evaluation"):
        text_windows(tokenizer, write(tmp_path, [None] * 3), "news", SOURCE, 128, 64)
