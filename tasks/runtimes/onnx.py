"""The runtime `onnx`: ONNX Runtime GenAI on a CPU, in a process of its own (tasks/engines/onnx.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tasks.engine_process import EngineProcess
from tasks.environments import locked
from tasks.errors import TaskError
from tasks.interpreter import Interpreter
from tasks.runtimes import Question
from tasks.runtimes.batches import batches
from tasks.runtimes.engine import EngineRuntime

PROGRAM = Interpreter(entry="tasks.engines.onnx", lock="locks/onnx.lock")
CONFIG = "genai_config.json"
DTYPE = "float32"
ARITHMETIC = f"{DTYPE}, 8-bit where weights are integers"
STEP = 1.6  # relative cost of a token in a step of its own


class OnnxRuntime(EngineRuntime):
    """See the protocol `Runtime`."""

    def __init__(self, directory: Path, dtype: str) -> None:
        if not (directory / CONFIG).is_file():
            raise TaskError(f"{directory} holds no ONNX model (no {CONFIG}); export it again: modelpress run")
        if dtype != DTYPE:
            raise TaskError(f"the graph in {directory} computes in {DTYPE}, not {dtype}; set dtype to {DTYPE}")
        engine, versions = EngineProcess(PROGRAM), locked("onnx")
        libraries = {name: versions[name] for name in ("onnxruntime-genai", "onnxruntime")}
        super().__init__(engine, directory, AutoTokenizer.from_pretrained(directory), libraries)
        found, _ = engine.ask("load", folder=str(directory), threads=torch.get_num_threads())
        self.info = self._described("onnxruntime-genai", found, ARITHMETIC)

    def _batches(
        self, questions: Sequence[Question], batch_tokens: int
    ) -> Iterator[tuple[str, list[tuple[int, Question]]]]:
        """Those of one way together: a context is read once, then its continuations in steps; where that is slower, as
        with a single long continuation, each is read whole."""
        stepwise = [i for i, question in enumerate(questions) if _stepwise_is_cheaper(question)]
        whole = [i for i, question in enumerate(questions) if not _stepwise_is_cheaper(question)]
        for action, indices in (("score_stepwise", stepwise), ("score", whole)):
            for batch in batches([questions[i] for i in indices], batch_tokens):
                yield action, [(indices[i], questions[indices[i]]) for i in batch]


def _stepwise_is_cheaper(question: Question) -> bool:
    """Whether reading the context once and then stepping costs less than reading each continuation whole."""
    lengths = [len(continuation) - 1 for continuation in question.continuations]
    context = len(question.context)
    return context + STEP * sum(lengths) < len(lengths) * context + sum(lengths)
