"""Generate the texts of one batch with ONNX Runtime GenAI.

The generator computes logits; the tokens are chosen here, row by row, so that the rows of a batch may have any
settings. Shorter prompts are padded at the end. The generator takes a padding token for no token, and its own end token
would end a row, so both are set to an id that prompts do not have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

# before the import: the wheels send usage data to Microsoft otherwise
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime_genai

from .errors import StartError
from .sampling import Scored, choose, score
from .sequence import Ended, Failed, PromptScored, Sequence, Written

VERSION = str(onnxruntime_genai.__version__)
CHUNK = 256  # tokens of a prompt that are read at once; cancellation is noticed between two chunks
_NO = numpy.float32(-1e30)


class Engine:
    """A loaded model. Not thread-safe. StartError if ONNX Runtime cannot load it."""

    def __init__(self, folder: Path, padding: int, vocabulary: int, threads: int) -> None:
        self.padding = padding
        self._vocabulary = vocabulary
        overlay = {
            "pad_token_id": padding,
            "eos_token_id": padding,
            "decoder": {"session_options": {"intra_op_num_threads": threads}},
        }
        try:
            config = onnxruntime_genai.Config(str(folder))
            config.overlay(json.dumps({"model": overlay}))
            self._model = onnxruntime_genai.Model(config)
        except Exception as error:  # the library raises no narrower type
            raise StartError(f"ONNX Runtime cannot load {folder}: {error}; export the model again") from error

    def run(self, sequences: list[Sequence], tick: Callable[[], None]) -> None:
        """Generate until each sequence has ended, and send their events. tick: called after each part of a prompt."""
        sequences = [one for one in sequences if one.going]
        if not sequences:
            return
        length = max(len(one.prompt) for one in sequences) + max(one.most for one in sequences)
        generator = self._begin(len(sequences), length)
        self._read(generator, sequences, tick)
        while any(one.going for one in sequences):
            tokens = self._choose(generator.get_logits()[:, -1], sequences)
            if any(one.going for one in sequences):
                self._append(generator, tokens)

    def _begin(self, rows: int, length: int) -> Any:
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        # all keys of genai_config.json that change what the generator chooses
        parameters.set_search_options(
            batch_size=rows,
            max_length=max(length, 2),
            min_length=0,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        return onnxruntime_genai.Generator(self._model, parameters)

    def _read(self, generator: Any, sequences: list[Sequence], tick: Callable[[], None]) -> None:
        """Read the prompts, and score those whose log-probabilities are wanted."""
        scored: list[list[Scored | None]] = [[None] for _ in sequences]
        if len(sequences) == 1:
            (one,) = sequences
            prompt = numpy.array(one.prompt, dtype=numpy.int32)
            for start in range(0, len(prompt), CHUNK):
                if not one.going:
                    return
                generator.append_tokens(prompt[start : start + CHUNK])
                tick()
                if one.prompt_logprobs is not None:
                    scored[0] += _scored(generator.get_output("logits")[0], one, start, one.prompt_logprobs)
        else:
            generator.append_tokens(_padded([one.prompt for one in sequences], self.padding))
            if any(one.prompt_logprobs is not None for one in sequences):
                logits = generator.get_output("logits")
                for row, one in enumerate(sequences):
                    if one.prompt_logprobs is not None:
                        scored[row] += _scored(logits[row], one, 0, one.prompt_logprobs)
        for one, found in zip(sequences, scored, strict=True):
            if one.prompt_logprobs is not None and one.going:
                one.send(PromptScored(tuple(found)))
            if one.most == 0:
                one.finish(Ended())

    def _choose(self, logits: NDArray[numpy.float32], sequences: list[Sequence]) -> list[int]:
        """Choose and report the next token of each row; rows that have ended get any token.

        logits: [rows, vocabulary].
        """
        tokens = []
        for row, one in zip(logits, sequences, strict=True):
            tokens.append(0)
            if not one.going:
                continue
            if not numpy.isfinite(row.max()):
                one.finish(Failed(500, "the model computed numbers that are not finite; check the export"))
                continue
            barred = one.ends if len(one.written) < one.least else ()
            tokens[-1] = choose(row, one.sampling, one.random, one.prompt, one.written, barred)
            one.written.append(tokens[-1])
            token = score(row, tokens[-1], one.logprobs or 0) if one.logprobs is not None else tokens[-1]
            ends = tokens[-1] in one.ends or tokens[-1] == self.padding
            if ends or len(one.written) == one.most:
                one.finish(Written(token, "stop" if ends else "length"))
            else:
                one.send(Written(token, None))
        return tokens

    def _append(self, generator: Any, tokens: list[int]) -> None:
        """Make these the rows' next tokens."""
        if len(tokens) == 1:
            generator.append_tokens(numpy.array(tokens, dtype=numpy.int32))
            return
        # the generator takes further tokens of several rows only as its own choice
        forced = numpy.full((len(tokens), 1, self._vocabulary), _NO)
        forced[range(len(tokens)), 0, tokens] = 0
        generator.set_logits(forced)
        generator.generate_next_token()


def _padded(prompts: list[tuple[int, ...]], padding: int) -> NDArray[numpy.int32]:
    rows = numpy.full((len(prompts), max(map(len, prompts))), padding, dtype=numpy.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows


def _scored(logits: NDArray[numpy.float32], one: Sequence, start: int, best: int) -> list[Scored | None]:
    """Score the prompt's tokens that these logits [tokens, vocabulary] predict; start: the place of the first row."""
    targets = one.prompt[start + 1 : start + 1 + len(logits)]
    return [score(row, target, best) for row, target in zip(logits, targets, strict=False)]
