"""llama.cpp, in a process of its own: what it reads as tokens, and its version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.engine_process import EngineProcess
from tasks.environments import locked
from tasks.errors import TaskError
from tasks.interpreter import Interpreter

PROGRAM = Interpreter(entry="tasks.engines.gguf", lock="locks/llama-cpp.lock")
PACKAGE = "llama-cpp-python"
# letters, digits, spaces, signs and scripts on which pre-tokenization rules differ
PROBE = (
    "I'VE been told he's 33, 3333 or 1234567 years old!!  Is it so?\n\n\n   def f(x):\n\t\treturn x**2 # ok\r\n"
    "Das Übermaß – нещо на Български, 我想在apple工作1314151天～ ៛ 🦙🦙 ...end.  "
)


def llama_cpp() -> EngineProcess:
    """A process of llama.cpp; TaskError if it cannot be compiled."""
    return EngineProcess(PROGRAM)


def version() -> str:
    """The version of llama-cpp-python."""
    return locked("llama-cpp")[PACKAGE]


def check_tokens(file: Path, model: Path) -> None:
    """TaskError unless llama.cpp produces the same tokens as the tokenizer of the directory `model`."""
    from transformers import AutoTokenizer  # takes seconds to import

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    engine = llama_cpp()
    try:
        plain = [PROBE, *PROBE.splitlines(keepends=True)]
        found, _ = engine.ask("tokenize", file=str(file), texts=plain)
        # include the chat template's special tokens
        known = (t for t in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(t) < found["rows"])
        special = "".join(known) + PROBE[:9]
        further, _ = engine.ask("tokenize", file=str(file), texts=[special])
    finally:
        engine.close()
    for text, theirs in zip([*plain, special], [*found["ids"], *further["ids"]], strict=True):
        ours = list(tokenizer(text).input_ids)
        if theirs != ours:
            raise TaskError(
                f"llama.cpp produces other tokens than the model was trained on: {text!r} is {theirs} instead of "
                f"{ours}; the target gguf does not support this tokenizer, use another target"
            )
