"""Load a GGUF file with llama.cpp, and check its tokenizer against the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
from transformers import AutoTokenizer

from tasks.errors import TaskError
from tasks.formats.gguf.llama_log import LOG

# letters, digits, spaces, signs and scripts on which pre-tokenization rules differ
PROBE = (
    "I'VE been told he's 33, 3333 or 1234567 years old!!  Is it so?\n\n\n   def f(x):\n\t\treturn x**2 # ok\r\n"
    "Das Übermaß – нещо на Български, 我想在apple工作1314151天～ ៛ 🦙🦙 ...end.  "
)


def load_model(path: Path, vocabulary: bool = False) -> Any:
    """Load a model, or only its vocabulary; TaskError with llama.cpp's message if it cannot load the file."""
    LOG.listen()
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = vocabulary
    parameters.n_gpu_layers = -1  # all, if there is a GPU
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise TaskError(f"llama.cpp cannot load {path}: {LOG.said()}")
    return model


def check_tokens(file: Path, model: Path) -> None:
    """TaskError unless llama.cpp produces the same tokens as the tokenizer of the directory `model`."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded = load_model(file, vocabulary=True)
    try:
        vocabulary = llama_cpp.llama_model_get_vocab(loaded)
        # include the chat template's special tokens
        rows = llama_cpp.llama_vocab_n_tokens(vocabulary)
        special = "".join(t for t in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(t) < rows)
        for text in (PROBE, *PROBE.splitlines(keepends=True), special + PROBE[:9]):
            theirs, ours = _tokenize(vocabulary, text), list(tokenizer(text).input_ids)
            if theirs != ours:
                raise TaskError(
                    f"llama.cpp produces other tokens than the model was trained on: {text!r} is {theirs} instead of "
                    f"{ours}; the target gguf does not support this tokenizer, use another target"
                )
    finally:
        llama_cpp.llama_model_free(loaded)


def _tokenize(vocabulary: Any, text: str) -> list[int]:
    data = text.encode()
    tokens = (llama_cpp.llama_token * (len(data) + 2))()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), tokens, len(tokens), True, True)
    return list(tokens[:count])
