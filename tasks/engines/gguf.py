"""llama.cpp, through llama-cpp-python's binding of its C interface.

The weight type determines the activations: 8 bits in blocks of 32 for Q4 and Q8, 16 bits for BF16 and F16. So `dtype`
is the dtype of the KV cache; sums are always float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy
from numpy.typing import NDArray

from tasks.engines.scores import score
from tasks.engines.wire import RefusalError
from tasks.engines.worker import run

SEQUENCES = 64  # parallel sequences in llama.cpp: the limit of a batch's branches
_CACHE = {"float32": 0, "float16": 1, "bfloat16": 30}  # ggml's type numbers
_LEAST = 512  # smallest context, tokens
_ERROR, _SAME = 4, 5  # log levels: error, continuation of the previous line

Logits = NDArray[numpy.float32]


class _Log:
    """llama.cpp's messages, kept for error reports."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._last = 0
        self.callback = llama_cpp.llama_log_callback(self._on_message)  # keep alive while llama.cpp may call it

    def _on_message(self, level: int, text: bytes, _: Any) -> None:
        self._last = self._last if level == _SAME else level
        if self._last == _ERROR:
            self.errors.append(text.decode(errors="replace").strip())

    def listen(self) -> None:
        self.errors.clear()
        llama_cpp.llama_log_set(self.callback, ctypes.c_void_p(0))

    def said(self) -> str:
        return "; ".join(error for error in self.errors if error) or "no message"


LOG = _Log()


@dataclass(frozen=True)
class Token:
    """A token to read: its id, position, sequences, and whether to output its logits."""

    id: int
    position: int
    sequences: Sequence[int]
    output: bool


class Engine:
    """See the protocol in worker.py."""

    actions = frozenset({"load", "score", "logits", "generate", "tokenize", "quantize"})

    def __init__(self) -> None:
        self._model: Any = None
        self._vocab: Any = None
        self._words = 0
        self._dtype = ""
        self._threads = 0
        self._context: Any = None
        self._room = (0, 0)  # tokens and sequences of the context

    def load(self, file: str, dtype: str, threads: int) -> dict[str, Any]:
        """Load a model. dtype: of the KV cache."""
        self._dtype, self._threads = dtype, threads
        self._model = _load(file)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._words = llama_cpp.llama_vocab_n_tokens(self._vocab)
        on_gpu = bool(llama_cpp.llama_supports_gpu_offload())
        return {"version": llama_cpp.__version__, "device": "cuda" if on_gpu else "cpu", "sequences": SEQUENCES}

    def score(self, questions: list[Any]) -> dict[str, Any]:
        """Score every continuation of each question [context, continuations]; those of one context share its tokens,
        each in its own sequence. At most `SEQUENCES` continuations in all."""
        tokens: list[Token] = []
        reads: list[list[list[int]]] = []  # output rows of each continuation
        sequence = rows = 0
        for context, continuations in questions:
            start = len(context)
            own = range(sequence, sequence + len(continuations))
            tokens += [Token(t, i, own, i == start - 1) for i, t in enumerate(context)]
            shared, rows = rows, rows + 1
            reads.append([])
            for number, continuation in zip(own, continuations, strict=True):
                # the last token is scored, but not an input
                tokens += [Token(t, start + i, [number], True) for i, t in enumerate(continuation[:-1])]
                reads[-1].append([shared, *range(rows, rows + len(continuation) - 1)])
                rows += len(continuation) - 1
            sequence = own.stop
        logits = self._read(tokens, sequence)
        return {
            "scores": [
                [score(logits[where], answer) for where, answer in zip(places, continuations, strict=True)]
                for places, (_, continuations) in zip(reads, questions, strict=True)
            ]
        }

    def logits(self, array: NDArray[numpy.int64]) -> Logits:
        """The logits after each token: [rows, tokens] -> [rows, tokens, vocabulary]."""
        found = numpy.empty((*array.shape, self._words), numpy.float32)
        for row, ids in enumerate(array):
            found[row] = self._read([Token(int(t), i, [0], True) for i, t in enumerate(ids)], 1)
        return found

    def generate(self, rows: list[list[int]], new_tokens: int, exact: bool, ends: list[int]) -> dict[str, Any]:
        """Continue rows of one length greedily: by exactly `new_tokens`, or one row by at most so many, until one of
        `ends` or an end token of the file."""
        start, count = len(rows[0]), len(rows)
        prompt = [Token(t, i, [number], i == start - 1) for number, row in enumerate(rows) for i, t in enumerate(row)]
        written: list[list[int]] = [[] for _ in rows]
        logits = self._read(prompt, count, more=count * new_tokens)
        for place in range(start, start + new_tokens):
            found = [int(i) for i in logits.argmax(-1)]
            if not exact and (found[0] in ends or llama_cpp.llama_vocab_is_eog(self._vocab, found[0])):
                break
            for row, token in zip(written, found, strict=True):
                row.append(token)
            if place + 1 < start + new_tokens:
                step = [Token(token, place, [number], True) for number, token in enumerate(found)]
                logits = self._read(step, count, keep=True)
        return {"ids": written}

    def tokenize(self, file: str, texts: list[str]) -> dict[str, Any]:
        """The tokens of each text by the file's vocabulary, special ones included, and the size of the vocabulary."""
        loaded = _load(file, vocabulary=True)
        try:
            vocabulary = llama_cpp.llama_model_get_vocab(loaded)
            rows = llama_cpp.llama_vocab_n_tokens(vocabulary)
            return {"ids": [_tokenize(vocabulary, text) for text in texts], "rows": rows}
        finally:
            llama_cpp.llama_model_free(loaded)

    def quantize(
        self, source: str, destination: str, scheme: str, threads: int, importance: dict[str, list[float]]
    ) -> dict[str, Any]:
        """Quantize a file, as llama-quantize does. importance: the mean square of each layer's inputs by llama.cpp's
        names; empty for none."""
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{scheme}")
        parameters.nthread = threads
        if importance:
            entries = [
                llama_cpp.llama_model_imatrix_data(name.encode(), (ctypes.c_float * len(values))(*values), len(values))
                for name, values in importance.items()
            ]
            entries.append(llama_cpp.llama_model_imatrix_data(None, None, 0))  # the end
            parameters.imatrix = (llama_cpp.llama_model_imatrix_data * len(entries))(*entries)
        LOG.listen()
        if llama_cpp.llama_model_quantize(source.encode(), destination.encode(), ctypes.byref(parameters)):
            raise RefusalError(f"llama.cpp could not quantize {source} to {scheme}: {LOG.said()}")
        return {}

    def _read(self, tokens: Sequence[Token], sequences: int, *, keep: bool = False, more: int = 0) -> Logits:
        """Logits after each requested token: [outputs, vocabulary], in llama.cpp's memory until the next call.

        keep: continue from the tokens read before; otherwise clear them, and make room for these tokens and `more`.
        """
        if not keep:
            self._make_room(len(tokens) + more, sequences)
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, sequences)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token.id, token.position, token.output
                batch.n_seq_id[i] = len(token.sequences)
                for j, number in enumerate(token.sequences):
                    batch.seq_id[i][j] = number
            LOG.listen()
            if status := llama_cpp.llama_decode(self._context, batch):
                raise RefusalError(f"llama.cpp could not read {len(tokens)} tokens (status {status}): {LOG.said()}")
        finally:
            llama_cpp.llama_batch_free(batch)
        outputs = sum(token.output for token in tokens)
        return numpy.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (outputs, self._words))

    def _make_room(self, tokens: int, sequences: int) -> None:
        """Create a context of at least this size, or keep the current one if it is large enough."""
        wanted = (max(tokens, _LEAST), max(sequences, SEQUENCES))
        if wanted[0] <= self._room[0] and wanted[1] <= self._room[1]:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            self._context = None
        room = (max(wanted[0], self._room[0]), max(wanted[1], self._room[1]))
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = room[0]
        parameters.n_seq_max = room[1]
        parameters.kv_unified = True  # sequences share tokens
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.type_k = parameters.type_v = _CACHE[self._dtype]
        LOG.listen()
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            self._context, self._room = None, (0, 0)
            raise RefusalError(f"llama.cpp could not create a context of {room[0]} tokens: {LOG.said()}")
        self._room = room


def _load(file: str, vocabulary: bool = False) -> Any:
    """Load a model, or only its vocabulary; RefusalError with llama.cpp's message if it cannot load the file."""
    LOG.listen()
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = vocabulary
    parameters.n_gpu_layers = -1  # all, if there is a GPU
    model = llama_cpp.llama_model_load_from_file(file.encode(), parameters)
    if not model:
        raise RefusalError(f"llama.cpp cannot load {file}: {LOG.said()}")
    return model


def _tokenize(vocabulary: Any, text: str) -> list[int]:
    data = text.encode()
    tokens = (llama_cpp.llama_token * (len(data) + 2))()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), tokens, len(tokens), True, True)
    return list(tokens[:count])


if __name__ == "__main__":
    run(Engine())
