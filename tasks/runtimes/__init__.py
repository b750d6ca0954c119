"""Where a pressed model runs: one module per target behind one small protocol. Evaluation and benchmark run in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tasks.errors import TaskError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RuntimeInfo:
    """What a figure was measured in."""

    name: str
    version: str
    device: str
    dtype: str
    threads: int
    processor: str


@dataclass(frozen=True)
class Question:
    """A context and the continuations whose likelihoods are asked for, as token ids; none of them is empty."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Score:
    """Log-likelihood (nats) of a continuation, and whether it is what the model would write greedily."""

    logprob: float
    greedy: bool


class Runtime(Protocol):
    """A loaded model.

    `fast` tells whether the runtime has a kernel for the model's format; where it has none, it computes with the
    dequantized weights, the results are exact, and a speed would say nothing about the format: `note` says so.
    """

    info: RuntimeInfo
    fast: bool
    note: str | None
    tokenizer: PreTrainedTokenizerBase

    @property
    def libraries(self) -> tuple[str, ...]:
        """Those whose versions can change a number, by their names in the package index."""

    def score(self, questions: Sequence[Question], batch_tokens: int, progress: str) -> list[list[Score]]:
        """Scores of every continuation of every question, in their order. progress: the bar's name; none without."""

    def logprobs(self, ids: Tensor) -> Tensor:
        """Natural log-probabilities of the next token: int64 [rows, tokens] -> float32 [rows, tokens, vocabulary]."""

    def generate_ids(self, ids: Tensor, new_tokens: int) -> Tensor:
        """Continue greedily, always by `new_tokens`: int64 [rows, tokens] -> [rows, tokens + new_tokens]."""

    def generate(self, prompt: str, new_tokens: int) -> str:
        """Continue a text greedily by at most `new_tokens`, ending where the model ends it."""


@runtime_checkable
class RuntimeWithStates(Runtime, Protocol):
    """A runtime that shows what the output layer reads."""

    def logprobs_and_states(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `logprobs`, and the last hidden states [rows, tokens, hidden]; None where the model does not show them."""


def load_runtime(target: str, directory: Path, dtype: str) -> Runtime:
    """Load the model in `directory` for `target`, computing in `dtype`; TaskError if the directory is no such model."""
    if not (directory / "config.json").is_file():
        raise TaskError(f"{directory} holds no model (no config.json); run the stage that makes it: modelpress run")
    match target:
        case "transformers":
            from tasks.runtimes.transformers import TransformersRuntime

            return TransformersRuntime(directory, dtype)
        case "onnx":
            from tasks.runtimes.onnx import OnnxRuntime

            return OnnxRuntime(directory, dtype)
        case "gguf":
            from tasks.runtimes.gguf import GgufRuntime

            return GgufRuntime(directory, dtype)
        case _:
            raise TaskError(f"no runtime for the target {target!r}; there are: transformers, onnx, gguf")
