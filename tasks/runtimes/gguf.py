"""The runtime `gguf`: llama.cpp, through llama-cpp-python's binding of its C interface.

The weight type determines the activations: 8 bits in blocks of 32 for Q4 and Q8, 16 bits for BF16 and F16. So `dtype`
is the dtype of the KV cache; sums are always float32.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tasks.errors import TaskError
from tasks.formats.gguf.llama_log import LOG
from tasks.formats.gguf.llama_model import load_model
from tasks.hardware import cpu_name, processor_name
from tasks.runtimes import Question, RuntimeInfo, Score
from tasks.runtimes.batches import batches
from tasks.text.bos import prompt_ids
from tasks.text.end_tokens import end_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEQUENCES = 64  # parallel sequences in llama.cpp: the limit of a batch's branches
_CACHE = {"float32": 0, "float16": 1, "bfloat16": 30}  # ggml's type numbers
_LEAST = 512  # smallest context, tokens


@dataclass(frozen=True)
class Token:
    """A token to read: its id, position, sequences, and whether to output its logits."""

    id: int
    position: int
    sequences: Sequence[int]
    output: bool


class GgufRuntime:
    """See the protocol `Runtime`."""

    libraries = ("llama-cpp-python",)

    def __init__(self, directory: Path, dtype: str) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        self._ends = frozenset(end_tokens(directory, self.tokenizer))  # the file may lack some
        self._dtype = dtype
        self._threads = torch.get_num_threads()
        self._model = load_model(gguf_file(directory))
        weakref.finalize(self, llama_cpp.llama_model_free, self._model)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._words = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._context: Any = None
        self._free: Any = None
        self._room = (0, 0)  # tokens and sequences of the context
        on_gpu = bool(llama_cpp.llama_supports_gpu_offload())
        self.info = RuntimeInfo(
            "llama-cpp-python",
            llama_cpp.__version__,
            "cuda" if on_gpu else "cpu",
            dtype,
            self._threads,
            processor_name() if on_gpu else cpu_name(),
        )
        self.fast = True
        self.note: str | None = None

    def score(self, questions: Sequence[Question], batch_tokens: int, progress: str) -> list[list[Score]]:
        """Score every continuation; those of one context share its tokens, each in its own sequence."""
        parts = [
            (index, Question(question.context, question.continuations[start : start + SEQUENCES]))
            for index, question in enumerate(questions)
            for start in range(0, len(question.continuations), SEQUENCES)
        ]
        scores: dict[int, list[Score]] = {}
        with tqdm(total=len(parts), desc=progress, unit="item", disable=not progress) as bar:
            for batch in batches([part for _, part in parts], batch_tokens):
                for group in _split(batch, [len(part.continuations) for _, part in parts]):
                    for number, found in zip(group, self._score([parts[i][1] for i in group]), strict=True):
                        scores[number] = found
                    bar.update(len(group))
        results: list[list[Score]] = [[] for _ in questions]
        for number, (index, _) in enumerate(parts):
            results[index] += scores[number]
        return results

    def _score(self, questions: list[Question]) -> list[list[Score]]:
        tokens: list[Token] = []
        reads: list[list[list[int]]] = []  # output rows of each continuation
        sequence = rows = 0
        for question in questions:
            start = len(question.context)
            own = range(sequence, sequence + len(question.continuations))
            tokens += [Token(t, i, own, i == start - 1) for i, t in enumerate(question.context)]
            shared, rows = rows, rows + 1
            reads.append([])
            for number, continuation in zip(own, question.continuations, strict=True):
                # the last token is scored, but not an input
                tokens += [Token(t, start + i, [number], True) for i, t in enumerate(continuation[:-1])]
                reads[-1].append([shared, *range(rows, rows + len(continuation) - 1)])
                rows += len(continuation) - 1
            sequence = own.stop
        logits = _logprobs(self._read(tokens, sequence))
        answers = [question.continuations for question in questions]
        return [
            [_scored(logits[where], answer) for where, answer in zip(*pair, strict=True)]
            for pair in zip(reads, answers, strict=True)
        ]

    def logprobs(self, ids: Tensor) -> Tensor:
        """See `Runtime`."""
        rows = ([Token(int(t), i, [0], True) for i, t in enumerate(row)] for row in ids)
        return torch.stack([_logprobs(self._read(row, 1)) for row in rows])

    def generate_ids(self, ids: Tensor, new_tokens: int) -> Tensor:
        """See `Runtime`."""
        rows, start = ids.shape
        prompt = [
            Token(int(t), i, [number], i == start - 1) for number, row in enumerate(ids) for i, t in enumerate(row)
        ]
        # numpy throughout: torch's threads would keep spinning and slow down llama.cpp's
        written = [self._read(prompt, rows, more=rows * new_tokens).argmax(-1)]
        for place in range(start, start + new_tokens - 1):
            step = [Token(int(t), place, [number], True) for number, t in enumerate(written[-1])]
            written.append(self._read(step, rows, keep=True).argmax(-1))
        return torch.cat([ids, torch.from_numpy(np.stack(written, 1))], 1)

    def generate(self, prompt: str, new_tokens: int) -> str:
        """See `Runtime`."""
        ids = prompt_ids(self.tokenizer, prompt)
        written: list[int] = []
        logits = self._read([Token(t, i, [0], i == len(ids) - 1) for i, t in enumerate(ids)], 1, more=new_tokens)
        while len(written) < new_tokens:
            token = int(logits[-1].argmax())
            if token in self._ends or llama_cpp.llama_vocab_is_eog(self._vocab, token):
                break
            written.append(token)
            if len(written) < new_tokens:
                logits = self._read([Token(token, len(ids) + len(written) - 1, [0], True)], 1, keep=True)
        return str(self.tokenizer.decode(written, skip_special_tokens=True))

    def _read(
        self, tokens: Sequence[Token], sequences: int, *, keep: bool = False, more: int = 0
    ) -> NDArray[np.float32]:
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
                raise TaskError(f"llama.cpp could not read {len(tokens)} tokens (status {status}): {LOG.said()}")
        finally:
            llama_cpp.llama_batch_free(batch)
        outputs = sum(token.output for token in tokens)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (outputs, self._words))

    def _make_room(self, tokens: int, sequences: int) -> None:
        """Create a context of at least this size, or keep the current one if it is large enough."""
        wanted = (max(tokens, _LEAST), max(sequences, SEQUENCES))
        if wanted[0] <= self._room[0] and wanted[1] <= self._room[1]:
            return
        if self._free is not None:
            self._free()
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
            self._room = (0, 0)
            raise TaskError(f"llama.cpp could not create a context of {room[0]} tokens: {LOG.said()}")
        self._free = weakref.finalize(self, llama_cpp.llama_free, self._context)
        self._room = room


def gguf_file(directory: Path) -> Path:
    """The GGUF file of a directory; TaskError if there is not exactly one."""
    found = sorted(directory.glob("*.gguf"))
    if len(found) != 1:
        raise TaskError(f"{directory} holds {len(found)} GGUF files, expected one; rebuild it: modelpress run")
    return found[0]


def _split(batch: list[int], sequences: list[int]) -> list[list[int]]:
    """Split a batch into parts of at most `SEQUENCES` sequences."""
    parts: list[list[int]] = [[]]
    for index in batch:
        if parts[-1] and sum(sequences[i] for i in parts[-1]) + sequences[index] > SEQUENCES:
            parts.append([])
        parts[-1].append(index)
    return parts


def _logprobs(logits: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(logits).log_softmax(-1)


def _scored(logits: Tensor, continuation: Sequence[int]) -> Score:
    """logits: log-probabilities [tokens, vocabulary] that predict each token of the continuation."""
    targets = torch.tensor(continuation)
    chosen = logits.gather(1, targets[:, None]).sum().item()
    return Score(chosen, bool((logits.argmax(-1) == targets).all()))
