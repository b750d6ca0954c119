"""The runtime `onnx`: ONNX Runtime GenAI on a CPU.

GenAI's own generator writes, so a benchmark times what a server would run. Scores come from a plain session on the same
model.onnx with as many threads, because the generator shows the last token's logits alone: the same graph, the same
kernels. The arithmetic is the graph's: float32, and where weights are integers, products of integers with activations
rounded to 8 bits. One of the two is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import onnxruntime_genai
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tasks.errors import TaskError
from tasks.hardware import cpu_name
from tasks.runtimes import Question, RuntimeInfo, Score
from tasks.runtimes.batches import batches

GRAPH, CONFIG = "model.onnx", "genai_config.json"
DTYPE = "float32"
ARITHMETIC = f"{DTYPE}, 8-bit where weights are integers"

PAST, PRESENT = "past_key_values.", "present."
STEP = 1.6  # what a token costs in a step of its own, against one among many

Ids = NDArray[numpy.int64]
# what the attention layers keep of the tokens before, by the name of the graph's input
Past = dict[str, NDArray[numpy.float32]]


class OnnxRuntime:
    """See the protocol `Runtime`."""

    libraries = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, directory: Path, dtype: str) -> None:
        if not (directory / CONFIG).is_file():
            raise TaskError(f"{directory} holds no ONNX model (no {CONFIG}); export it again: modelpress run")
        if dtype != DTYPE:
            raise TaskError(f"the graph in {directory} computes in {DTYPE}, not {dtype}; set dtype to {DTYPE}")
        self.directory = directory
        self._threads = torch.get_num_threads()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        version = f"{onnxruntime_genai.__version__} (onnxruntime {onnxruntime.__version__})"
        self.info = RuntimeInfo("onnxruntime-genai", version, "cpu", ARITHMETIC, self._threads, cpu_name())
        self.fast = True
        self.note: str | None = None
        self._head: int = _json(directory / CONFIG)["model"]["decoder"]["head_size"]
        self._session: onnxruntime.InferenceSession | None = None
        self._generator: onnxruntime_genai.Model | None = None
        self._load_generator()

    def score(self, questions: Sequence[Question], batch_tokens: int, progress: str) -> list[list[Score]]:
        """Scores of every continuation.

        A context is read once and its continuations go on from there, side by side and one token a step: the attention
        kernel takes no more where there are tokens before. Where that would take longer, as with a single long
        continuation, each is read whole, with its context.
        """
        results: list[list[Score]] = [[] for _ in questions]
        stepwise = [i for i, question in enumerate(questions) if _steps_pay(question)]
        whole = [i for i, question in enumerate(questions) if not _steps_pay(question)]
        with tqdm(total=len(questions), desc=progress, unit="item", disable=not progress) as bar:
            for indices, way in ((stepwise, self._score_stepwise), (whole, self._score_whole)):
                asked = [questions[i] for i in indices]
                for batch in batches(asked, batch_tokens):
                    for place, scores in zip(batch, way([asked[i] for i in batch]), strict=True):
                        results[indices[place]] = scores
                    bar.update(len(batch))
        return results

    def _score_whole(self, questions: list[Question]) -> list[list[Score]]:
        branches = [(question.context, c) for question in questions for c in question.continuations]
        # the last token of a continuation is scored, but never read on from
        sequences = [(*context, *continuation[:-1]) for context, continuation in branches]
        logits, _ = self._run(_rows(sequences))
        scores = iter(
            _score(logits[row, len(context) - 1 : len(sequences[row])], continuation)
            for row, (context, continuation) in enumerate(branches)
        )
        return [[next(scores) for _ in question.continuations] for question in questions]

    def _score_stepwise(self, questions: list[Question]) -> list[list[Score]]:
        logits, past = self._run(_rows([question.context for question in questions]))
        lengths = [len(question.context) for question in questions]
        branches = [(row, c) for row, question in enumerate(questions) for c in question.continuations]
        found = [[logits[row, lengths[row] - 1]] for row, _ in branches]
        # the longest first, so that those that still go on are always the first rows
        going = sorted((i for i, (_, c) in enumerate(branches) if len(c) > 1), key=lambda i: -len(branches[i][1]))
        if going:
            past = {name: kept[[branches[i][0] for i in going]] for name, kept in past.items()}
        step = 0
        while going := [i for i in going if len(branches[i][1]) > step + 1]:
            ids = numpy.array([[branches[i][1][step]] for i in going])
            before = [lengths[branches[i][0]] + step for i in going]
            logits, past = self._run(ids, {name: kept[: len(going)] for name, kept in past.items()}, before)
            for row, i in enumerate(going):
                found[i].append(logits[row, 0])
            step += 1
        scores = iter(_score(torch.stack(rows), c) for rows, (_, c) in zip(found, branches, strict=True))
        return [[next(scores) for _ in question.continuations] for question in questions]

    def logprobs(self, ids: Tensor) -> Tensor:
        """See `Runtime`."""
        logits, _ = self._run(ids.numpy())
        return logits.log_softmax(-1)

    def generate_ids(self, ids: Tensor, new_tokens: int) -> Tensor:
        """See `Runtime`."""
        rows, tokens = ids.shape
        length = tokens + new_tokens
        generator = self._begin(rows, max_length=length, min_length=length)
        generator.append_tokens(ids.numpy().astype(numpy.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
        return torch.stack([torch.from_numpy(generator.get_sequence(row).astype(numpy.int64)) for row in range(rows)])

    def generate(self, prompt: str, new_tokens: int) -> str:
        """See `Runtime`."""
        ids = self.tokenizer(prompt).input_ids
        generator = self._begin(1, max_length=len(ids) + new_tokens, min_length=0)
        generator.append_tokens(numpy.array(ids, dtype=numpy.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return str(self.tokenizer.decode(generator.get_sequence(0)[len(ids) :], skip_special_tokens=True))

    def _begin(self, rows: int, **options: Any) -> Any:
        """A generator that always takes the likeliest token."""
        parameters = onnxruntime_genai.GeneratorParams(self._load_generator())
        greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        parameters.set_search_options(batch_size=rows, **greedy, **options)
        return onnxruntime_genai.Generator(self._generator, parameters)

    def _load_generator(self) -> Any:
        if self._generator is None:
            self._session = None
            config = onnxruntime_genai.Config(str(self.directory))
            session = {"intra_op_num_threads": self._threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            self._generator = onnxruntime_genai.Model(config)
        return self._generator

    def _load_session(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            self._generator = None
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._threads
            self._session = onnxruntime.InferenceSession(
                str(self.directory / GRAPH), options, providers=["CPUExecutionProvider"]
            )
        return self._session

    def _run(self, ids: Ids, past: Past | None = None, before: Sequence[int] = ()) -> tuple[Tensor, Past]:
        """Logits [rows, tokens, vocabulary] of the tokens `ids` [rows, tokens], and the past of what comes next.

        What fills up a row stands behind its tokens, where they do not see it. past: to go on from, with one token a
        row; before: how many of its tokens count, in each row.
        """
        session = self._load_session()
        rows, tokens = ids.shape
        if past is None:
            mask = numpy.ones_like(ids)
            shapes = {i.name: i.shape for i in session.get_inputs() if i.name.startswith(PAST)}
            past = {name: numpy.empty((rows, shape[1], 0, self._head), numpy.float32) for name, shape in shapes.items()}
        else:
            mask = (numpy.arange(max(before) + tokens) < numpy.array(before)[:, None] + tokens).astype(ids.dtype)
        names = [output.name for output in session.get_outputs()]
        logits, *kept = session.run(names, {"input_ids": ids, "attention_mask": mask, **past})
        return torch.from_numpy(logits), {
            PAST + n.removeprefix(PRESENT): k for n, k in zip(names[1:], kept, strict=True)
        }


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _steps_pay(question: Question) -> bool:
    """Whether reading the context once and then going on by steps is less work than reading each continuation whole."""
    lengths = [len(continuation) - 1 for continuation in question.continuations]
    context = len(question.context)
    return context + STEP * sum(lengths) < len(lengths) * context + sum(lengths)


def _score(logits: Tensor, continuation: Sequence[int]) -> Score:
    """Of a continuation, from the logits [tokens, vocabulary] that foretell its tokens."""
    targets = torch.tensor(continuation)
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])
    return Score(chosen.sum().item(), bool((logits.argmax(-1) == targets).all()))


def _rows(sequences: Sequence[Sequence[int]]) -> Ids:
    """Sequences of different lengths one below the other, filled up behind."""
    rows = numpy.zeros((len(sequences), max(map(len, sequences))), dtype=numpy.int64)
    for row, sequence in enumerate(sequences):
        rows[row, : len(sequence)] = sequence
    return rows
