"""The runtime `gguf`: llama.cpp, in a process of its own (tasks/engines/gguf.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tasks.errors import TaskError
from tasks.formats.gguf.llama_cpp import PACKAGE, llama_cpp, version
from tasks.runtimes import Question
from tasks.runtimes.batches import batches
from tasks.runtimes.engine import EngineRuntime
from tasks.text.end_tokens import end_tokens


class GgufRuntime(EngineRuntime):
    """See the protocol `Runtime`. dtype: of the KV cache; the weights' types decide what is computed in."""

    def __init__(self, directory: Path, dtype: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        file, engine = gguf_file(directory), llama_cpp()
        ends = end_tokens(directory, tokenizer)  # the file may lack some
        super().__init__(engine, directory, tokenizer, {PACKAGE: version()}, ends)
        found, _ = engine.ask("load", file=str(file), dtype=dtype, threads=torch.get_num_threads())
        self.info = self._described(PACKAGE, found, dtype)
        self._most = found["sequences"]  # continuations in a batch

    def _batches(
        self, questions: Sequence[Question], batch_tokens: int
    ) -> Iterator[tuple[str, list[tuple[int, Question]]]]:
        """With few enough continuations for llama.cpp; questions with more in parts."""
        parts = [
            (index, Question(question.context, question.continuations[start : start + self._most]))
            for index, question in enumerate(questions)
            for start in range(0, len(question.continuations), self._most)
        ]
        for batch in batches([part for _, part in parts], batch_tokens):
            for group in _split(batch, [len(part.continuations) for _, part in parts], self._most):
                yield "score", [parts[i] for i in group]


def gguf_file(directory: Path) -> Path:
    """The GGUF file of a directory; TaskError if there is not exactly one."""
    found = sorted(directory.glob("*.gguf"))
    if len(found) != 1:
        raise TaskError(f"{directory} holds {len(found)} GGUF files, expected one; rebuild it: modelpress run")
    return found[0]


def _split(batch: list[int], sequences: list[int], most: int) -> list[list[int]]:
    """Split a batch into parts of at most `most` sequences."""
    parts: list[list[int]] = [[]]
    for index in batch:
        if parts[-1] and sum(sequences[i] for i in parts[-1]) + sequences[index] > most:
            parts.append([])
        parts[-1].append(index)
    return parts
