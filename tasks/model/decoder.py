"""A decoder model with one of its layers in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tasks.hardware import release_memory
from tasks.tensor_files import TensorFiles

LARGE = 1 << 26  # bytes of a layer's weights; releasing the memory of smaller ones frees little and costs time


class Decoder:
    """Runs a model layer by layer: all sequences through one layer, then through the next.

    dtype: of the activations; products: of the matrix products and their weights, None: `dtype`; on a CPU, attention is
    computed in `dtype` (_ExactAttention). Memory: first the embedding, then one layer's weights; never the whole model.
    Supports families whose decoder layers are `model.layers` in transformers (tasks/model/compatibility.py).
    """

    def __init__(self, directory: Path, dtype: torch.dtype, device: str, products: torch.dtype | None = None) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM  # takes seconds to import

        self.files = TensorFiles(directory)
        self.dtype, self.device = dtype, device
        self.products = products or dtype
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        # weights need no gradient; an activation gets one if the caller's input requires it
        self._base = model.base_model.eval().requires_grad_(False)
        self.prefix = f"{model.base_model_prefix}."
        self._layers: list[nn.Module] = list(self._base.layers)
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        # not in the weight files: recompute
        self._base.rotary_emb = type(self._base.rotary_emb)(config=config).to(device)
        self._norm: nn.Module = self._base.norm
        self._base.norm = nn.Identity()

    @property
    def widths(self) -> tuple[int, int, int]:
        """Hidden size, largest size inside a layer, vocabulary size."""
        config = self._base.config
        return config.hidden_size, config.intermediate_size, config.vocab_size

    @property
    def layer_parameters(self) -> int:
        """Number of weights in the largest layer."""
        return max(sum(parameter.numel() for parameter in layer.parameters()) for layer in self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def embed(self, batches: list[Tensor]) -> list[Tensor]:
        """The input of the first layer: int64 [rows, tokens] -> [rows, tokens, channels] for each batch."""
        weight = self.files.read(f"{self.prefix}embed_tokens.weight").to(self.dtype)
        self._base.embed_tokens.load_state_dict({"weight": weight}, assign=True)
        self._base.embed_tokens.to(self.device)
        hidden = []
        for ids in batches:
            # the model makes masks and positions: record the arguments that it passes to its layers
            recorders = [_Recorder() for _ in self._layers]
            self._base.layers = nn.ModuleList(recorders)
            self._base(input_ids=ids.to(self.device), use_cache=False)
            self._arguments[len(ids)] = [recorder.arguments for recorder in recorders]
            hidden.append(recorders[0].hidden)
        self._base.embed_tokens.to("meta")
        return hidden

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Load the layer for the duration of the body."""
        layer = self._layers[index]
        layer.load_state_dict(self._read(self.layer_prefix(index)), assign=True)
        yield layer
        layer.to("meta")
        if sum(parameter.nbytes for parameter in layer.parameters()) > LARGE:
            release_memory()

    def layer_prefix(self, index: int) -> str:
        """The prefix of the layer's tensor names."""
        return f"{self.prefix}layers.{index}."

    def run(self, index: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run one batch through `layer`, loaded by `layer(index)`, as in the whole model."""
        with self._mixed():
            found = layer(hidden, **self._arguments[len(hidden)][index])
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    def norm(self) -> nn.Module:
        """The final norm, with its weights."""
        self._norm.load_state_dict(self._read(f"{self.prefix}norm."), assign=True)
        return self._norm

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Load the final norm and the output layer for the duration of the body: [rows, tokens, channels] -> logits
        [rows, tokens, vocabulary].

        Memory: the output layer in its stored and in its product dtype, and the logits.
        """
        norm = self.norm()
        # a tied output layer has no weights of its own
        own = "lm_head.weight"
        stored = self.files.read(own if own in set(self.files) else f"{self.prefix}embed_tokens.weight")
        weight = stored.to(self.device, self.products)

        def words(hidden: Tensor) -> Tensor:
            with self._mixed():
                return nn.functional.linear(norm(hidden), weight)

        yield words

    def _read(self, prefix: str) -> dict[str, Tensor]:
        """Read the tensors below `prefix` in their compute dtypes: matrices in the products' dtype."""
        return {
            name: tensor.to(self.device, self.products if tensor.dim() > 1 else self.dtype)
            for name, tensor in self.files.below(prefix).items()
        }

    @contextmanager
    def _mixed(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.products != self.dtype:
                stack.enter_context(torch.autocast(self.device, self.products))
                if self.device == "cpu":
                    stack.enter_context(_ExactAttention(self.dtype))
            yield


class _ExactAttention(TorchFunctionMode):
    """Computes attention in `dtype`, overriding autocast.

    With AMX, torch chooses between two bfloat16 attention kernels by the number of threads
    (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, need_pack), and their last bits differ.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(self._cast, args), **{name: self._cast(value) for name, value in kwargs.items()})

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Recorder(nn.Module):
    """A stand-in for a layer that records its arguments and returns its input."""

    hidden: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden
