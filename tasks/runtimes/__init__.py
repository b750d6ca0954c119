"""Runtimes for quantized models: one module per target, behind one protocol, for evaluation and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tasks.device import compute_device
from tasks.errors import TaskError
from tasks.hardware import device_memory
from tasks.settings import TARGETS
from tasks.targets import files_of
from tasks.tensor_files import BYTES, DTYPES, TensorFiles

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RuntimeInfo:
    """The environment of a measurement."""

    name: str
    version: str
    device: str
    dtype: str
    threads: int
    processor: str


@dataclass(frozen=True)
class Question:
    """A context and its continuations to score, as non-empty lists of token ids."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Score:
    """Log-likelihood (nats) of a continuation, and whether it is the greedy continuation."""

    logprob: float
    greedy: bool


class Runtime(Protocol):
    """A loaded model.

    `fast`: whether the runtime has a kernel for the model's format. Without one it computes with dequantized weights:
    results are exact, but speed says nothing about the format, and `note` says so. `libraries`: the versions of those
    that can affect results, by package name.
    """

    info: RuntimeInfo
    fast: bool
    note: str | None
    tokenizer: PreTrainedTokenizerBase
    libraries: Mapping[str, str]

    @property
    def peak_memory_bytes(self) -> int:
        """The peak of the memory in which it computes: of all its processes, or of the GPU."""

    def score(self, questions: Sequence[Question], batch_tokens: int, progress: str) -> list[list[Score]]:
        """Score every continuation of every question, in order. progress: the name of the bar; none if empty."""

    def logprobs(self, ids: Tensor) -> Tensor:
        """Natural log-probabilities of the next token: int64 [rows, tokens] -> float32 [rows, tokens, vocabulary]."""

    def generate_ids(self, ids: Tensor, new_tokens: int) -> Tensor:
        """Continue greedily by exactly `new_tokens`: int64 [rows, tokens] -> [rows, tokens + new_tokens]."""

    def generate(self, prompt: str, new_tokens: int) -> str:
        """Continue a text greedily by at most `new_tokens`, stopping at the model's end token."""


@runtime_checkable
class RuntimeWithStates(Runtime, Protocol):
    """A runtime that shows what the output layer reads."""

    def logprobs_and_states(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `logprobs`, and the last hidden states [rows, tokens, hidden]; None where the model does not show them."""


def load_runtime(target: str, directory: Path, dtype: str) -> Runtime:
    """Load the model in `directory` for `target`, computing in `dtype`; TaskError if there is no such model.

    The runtime of `vllm` is that of `transformers`: it reads the same files.
    """
    if not (directory / "config.json").is_file():
        raise TaskError(f"{directory} holds no model (no config.json); run its stage: modelpress run")
    match files_of(target):
        case "transformers":
            from tasks.runtimes.transformers import TransformersRuntime

            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            if "quantization_config" not in config and not any(directory.glob("*.gguf")):
                check_room(directory, dtype)
            return TransformersRuntime(directory, dtype)
        case "onnx":
            from tasks.runtimes.onnx import OnnxRuntime

            return OnnxRuntime(directory, dtype)
        case "gguf":
            from tasks.runtimes.gguf import GgufRuntime

            return GgufRuntime(directory, dtype)
        case _:
            raise TaskError(f"no runtime for the target {target!r}; there are: {', '.join(TARGETS)}")


def check_room(model: Path, dtype: str) -> None:
    """TaskError if the weights of an unquantized model alone do not fit in this machine's memory, or its GPU's."""
    files = TensorFiles(model)
    parameters = sum(files.entry(name).count for name in files)
    needed, memory = parameters * BYTES[DTYPES[dtype]], device_memory()
    if needed > memory:
        raise TaskError(
            f"evaluating the baseline needs more than {needed / 1e9:.1f} GB of memory for its {parameters / 1e9:.1f} "
            f"billion weights in {dtype}, and this machine has {memory / 1e9:.1f} GB"
            f"{' on its GPU' if compute_device() == 'cuda' else ''}; run on a machine with more memory, or with a GPU "
            "that has as much, or choose a smaller model"
            + ", or set evaluation.dtype to bfloat16, which takes half"
            * (dtype == "float32")
        )


def loaded_bytes(parameters: int, stored: int, dtype: str, native: bool, predictions: int) -> int:
    """The memory, bytes, that a loaded model takes at most, in any runtime: its weights in `dtype` beside its file of
    `stored` bytes, twice where dense.py reads the format (native false), and `predictions` tokens' logits three times,
    given as numbers."""
    return parameters * BYTES[DTYPES[dtype]] * (1 if native else 2) + stored + 12 * predictions
