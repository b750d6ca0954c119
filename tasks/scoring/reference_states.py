"""Store the baseline's last hidden states over the held-out texts, and compute its predictions from them.

Measuring a variant's divergence then needs only the baseline's output layer, not its decoder layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from tasks.tensor_files import EMBEDDING, OUTPUT, TensorFiles, save

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.runtimes import RuntimeWithStates

_CLOSE = 1e-5  # tolerance for log-probabilities: above rounding errors, below the effect of scaling or capping logits


def states_file(folder: Path, text: str) -> Path:
    """The file with the states of a text."""
    return folder / f"states-{text}.safetensors"


class OutputLayer:
    """The output layer of an unquantized model, in the dtype and on the device of the computation.

    weight: [vocabulary, hidden]; bias: [vocabulary].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def logprobs(self, states: Tensor) -> Tensor:
        """Natural log-probabilities: float [tokens, hidden] -> float32 [tokens, vocabulary]."""
        from torch.nn.functional import linear

        return linear(states.to(self._weight), self._weight, self._bias).float().log_softmax(-1)


def output_layer(directory: Path, dtype: str, device: str) -> OutputLayer | None:
    """Read only the output layer of the model in `directory`; None if it is not found.

    dtype, device: of the computation, by torch's names.
    """
    import torch

    if not list(directory.glob("*.safetensors")):
        return None
    files = TensorFiles(directory)
    # a model with tied embeddings has no separate output layer
    name = next((name for name in (OUTPUT, EMBEDDING) if f"{name}.weight" in files), None)
    if name is None:
        from tasks.model.announced import announced  # imports torch

        found = announced(directory)
        name = found.output or found.embedding
    weight, bias = (
        files.read(part).to(device, getattr(torch, dtype)) if part in files else None
        for part in (f"{name}.weight", f"{name}.bias" if name != EMBEDDING else f"{OUTPUT}.bias")
    )
    return OutputLayer(weight, bias) if weight is not None else None


class StateWriter:
    """Collects the states of one text while its windows are measured.

    The first window shows whether the output layer alone turns the states into the model's predictions. If not (capped
    or scaled logits, a second layer), no states are kept.
    """

    def __init__(self, runtime: RuntimeWithStates, layer: OutputLayer) -> None:
        self._runtime = runtime
        self._layer = layer
        self._states: list[Tensor] = []
        self._fits = True

    def logprobs(self, ids: Tensor) -> Tensor:
        """The runtime's log-probabilities."""
        if not self._fits:
            return self._runtime.logprobs(ids)
        found, states = self._runtime.logprobs_and_states(ids)
        if states is None or (not self._states and not self._gives(states[0], found[0])):
            self._fits = False
        else:
            self._states.append(states[0, :-1].float().cpu())
        return found

    def _gives(self, states: Tensor, found: Tensor) -> bool:
        try:
            difference = (self._layer.logprobs(states) - found).abs().max()
        except RuntimeError:  # the shapes differ
            return False
        return bool(difference <= _CLOSE)

    def write(self, path: Path) -> None:
        """Write float32 [tokens - 1, hidden] of each window, by its number; no file if no states were kept."""
        if self._fits:
            save({str(number): states for number, states in enumerate(self._states)}, path)


class States:
    """The baseline's predictions, computed from the states that a `StateWriter` wrote to `path`."""

    def __init__(self, path: Path, layer: OutputLayer) -> None:
        self._path = path
        self._layer = layer

    def __call__(self, window: int, ids: Tensor) -> Tensor:
        """Log-probabilities of a window's tokens after the first: float32 [tokens - 1, vocabulary]."""
        with safe_open(self._path, framework="pt") as file:
            return self._layer.logprobs(file.get_tensor(str(window)))
