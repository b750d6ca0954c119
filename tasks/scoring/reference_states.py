"""The baseline's last hidden states over the held-out texts: with its output layer they give its predictions.

So a variant's divergence needs neither the baseline's decoder layers nor the time that they take.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from tasks.tensor_files import EMBEDDING, OUTPUT, TensorFiles, save

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.runtimes import RuntimeWithStates

_CLOSE = 1e-4  # of log-probabilities: far above rounding, far below what a scale or a cap of the logits changes


def states_file(folder: Path, text: str) -> Path:
    """Where the states of a text are kept."""
    return folder / f"states-{text}.safetensors"


class OutputLayer:
    """The output layer of an unquantized model, in the precision and on the device of the arithmetic.

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
    """Read the output layer of the model in `directory` and nothing else of it; None where it is not found.

    dtype: of the arithmetic, by torch's name; device: by torch's name.
    """
    import torch

    if not list(directory.glob("*.safetensors")):
        return None
    files = TensorFiles(directory)
    # a model without one of its own multiplies with the embedding
    name = next((name for name in (OUTPUT, EMBEDDING) if f"{name}.weight" in files), None)
    if name is None:
        return None
    weight, bias = (
        files.read(part).to(device, getattr(torch, dtype)) if part in files else None
        for part in (f"{name}.weight", f"{OUTPUT}.bias")
    )
    return OutputLayer(weight, bias) if weight is not None else None


class StateWriter:
    """Remembers the states of one text while its windows are measured, if the output layer alone turns them into the
    model's predictions: a cap or a scale of the logits, or a second layer, is found on the first window."""

    def __init__(self, runtime: RuntimeWithStates, layer: OutputLayer) -> None:
        self._runtime = runtime
        self._layer = layer
        self._states: list[Tensor] = []
        self._fits = True

    def logprobs(self, ids: Tensor) -> Tensor:
        """As the runtime's."""
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
        except RuntimeError:  # of another shape
            return False
        return bool(difference <= _CLOSE)

    def write(self, path: Path) -> None:
        """float32 [tokens - 1, hidden] of each window, by its number; nothing where the states do not tell all."""
        if self._fits:
            save({str(number): states for number, states in enumerate(self._states)}, path)


class States:
    """The baseline's predictions, from what a `StateWriter` wrote to `path`."""

    def __init__(self, path: Path, layer: OutputLayer) -> None:
        self._path = path
        self._layer = layer

    def __call__(self, window: int, ids: Tensor) -> Tensor:
        """Log-probabilities of a window's tokens after the first: float32 [tokens - 1, vocabulary]."""
        with safe_open(self._path, framework="pt") as file:
            return self._layer.logprobs(file.get_tensor(str(window)))
