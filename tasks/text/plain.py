"""Text files as every reader of the project accepts them: without a byte order mark and without half characters."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
_ESCAPED = re.compile(rb"\\u[dD][89a-fA-F]")  # in JSON, a half of a surrogate pair
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Plain:
    """The changed content of a file. replaced: the number of lone surrogates that became U+FFFD."""

    content: bytes
    replaced: int


def plain_text(path: Path, form: Literal["text", "jsonl", "parquet"]) -> Plain | None:
    """The content of a valid UTF-8 or JSONL file after the repair; None if it needs none.

    A JSON string may hold half of a surrogate pair as an escape (`"\\ud83d"`), which no tokenizer can encode. Only
    lines with one are written anew.
    """
    if form == "parquet":
        return None
    content = path.read_bytes()
    if form == "text" or not _ESCAPED.search(content):
        return Plain(content.removeprefix(MARK), 0) if content.startswith(MARK) else None
    replaced, lines = 0, []
    for line in content.removeprefix(MARK).splitlines(keepends=True):
        if _ESCAPED.search(line):
            text, count = _HALF.subn("\ufffd", json.dumps(json.loads(line), ensure_ascii=False))
            replaced += count
            line = f"{text}\n".encode() if count else line
        lines.append(line)
    return Plain(b"".join(lines), replaced) if replaced or content.startswith(MARK) else None
