"""A decoder model with one of its layers in memory at a time.

The model's own code runs: stand-ins take the place of the layers, so that masks, positions, rotary tables and all other
arguments of a layer, and what follows the last one, are the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tasks.errors import TaskError
from tasks.hardware import release_memory
from tasks.model.linears import Origins
from tasks.model.mapped import Mapped, in_memory
from tasks.model.names import Names, in_own_storage
from tasks.model.skeleton import embedded, find_layers, place, replaced, skeleton, tensor_at
from tasks.tensor_files import TensorFiles

LARGE = 1 << 26  # bytes of a layer's weights; releasing the memory of smaller ones frees little and costs time


@dataclass(frozen=True)
class Call:
    """What the model passes to a layer besides the hidden states. name: the keyword of the hidden states; None: they
    are the first argument."""

    name: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """The hidden states of a call, and all else."""
        if args:
            return args[0], Call(None, args[1:], kwargs)
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point())
        return kwargs[name], Call(name, (), {key: value for key, value in kwargs.items() if key != name})

    def run(self, layer: nn.Module, hidden: Tensor) -> Any:
        """Call `layer`."""
        if self.name is None:
            return layer(hidden, *self.args, **self.kwargs)
        return layer(**{self.name: hidden}, **self.kwargs)


class Decoder:
    """Runs a model layer by layer: all sequences through one layer, then through the next.

    dtype: of the activations; products: of the matrix products and their weights, None: `dtype`; on a CPU, attention is
    computed in `dtype` (_ExactAttention). Memory: the embedding and what else lies outside the layers, then one layer's
    weights, at last the output layer; never the whole model. TaskError for a model whose layers are not found.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, device: str, products: torch.dtype | None = None) -> None:
        from transformers import AutoConfig  # takes seconds to import

        self.files = TensorFiles(directory)
        self.dtype, self.device = dtype, device
        self.products = products or dtype
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        self.model = skeleton(config, dtype, device)
        self.config = config.get_text_config(decoder=True)
        self._list, self._layers = find_layers(self.model)
        self._names = Names(self.model, self.files)
        self._calls: list[dict[int, Call]] = []  # by batch
        self._origins: dict[str, Origins] = {}
        self._prefixes: dict[int, str] = {}
        self._added = 0  # tokens that the model itself puts before a text
        self._form: tuple[Any, ...] | None = None  # of what a layer returns
        self.order: list[int] = list(range(len(self._layers)))  # the layers that text passes through

    @property
    def widths(self) -> tuple[int, int, int]:
        """Hidden size, largest size inside a layer, vocabulary size."""
        inner = max(max(p.shape[-2:]) for layer in self._layers for p in layer.parameters() if p.dim() > 1)
        return self.config.hidden_size, inner, self.config.vocab_size

    @property
    def layer_parameters(self) -> int:
        """Number of weights in the largest layer."""
        return max(sum(parameter.numel() for parameter in layer.parameters()) for layer in self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def shares_state(self) -> bool:
        """Whether a layer may leave things for another besides what it returns, such as keys and values; known after
        `embed`."""
        values = [
            value for calls in self._calls for call in calls.values() for value in (*call.args, *call.kwargs.values())
        ]
        return any(isinstance(value, MutableMapping | list) for value in values)

    # ---- the layers

    def layer_prefix(self, index: int) -> str:
        """The prefix of the layer's tensor names on disk. TaskError if they have none of their own."""
        if index in self._prefixes:
            return self._prefixes[index]
        inside = self._inside(index)
        names = [name for name, target in self._names.target.items() if target.startswith(inside)]
        found = names[0].split(".")[:-1] if names else []
        while found and (found[-1] != str(index) or not all(name.startswith(".".join(found) + ".") for name in names)):
            found.pop()
        if not found:
            raise TaskError(
                f"the tensors of decoder layer {index} have no common prefix with its number ({', '.join(names[:3])}); "
                "its layers cannot be pressed one by one"
            )
        self._prefixes[index] = ".".join(found) + "."
        return self._prefixes[index]

    @contextmanager
    def layer(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Load the layer for the duration of the body. tensors: by the rest of their names on disk, instead of those in
        the model's files; weights that it shares with other layers, stored there, are read all the same."""
        layer, inside = self._layers[index], self._inside(index)
        with self.roomy(index):
            if tensors is None:
                found = {name: self.files.read(name) for name in self._names.stored(inside)}
            else:
                prefix = self.layer_prefix(index)
                elsewhere = (name for name in self._names.stored(inside) if not name.startswith(prefix))
                found = {name: self.files.read(name) for name in elsewhere}
                found |= {prefix + name: tensor for name, tensor in tensors.items()}
            names = [name for name in self.model.state_dict() if name.startswith(inside)]
            self._load(found, names, self.products)
            del found
            yield layer
        size = sum(parameter.nbytes for parameter in layer.parameters())
        self._unload(names)
        if size > LARGE:
            release_memory()

    def roomy(self, index: int) -> AbstractContextManager[object]:
        """For work with copies of the layer's weights: where the layer is large, they are put into files."""
        parameters = sum(parameter.numel() for parameter in self._layers[index].parameters())
        return nullcontext() if in_memory(parameters, self.device) else Mapped()

    def run(self, index: int, layer: nn.Module, hidden: Tensor, batch: int = 0) -> Tensor:
        """Run hidden states through `layer`, loaded by `layer(index)`, as in the whole model. batch: the number of the
        batch in `embed` whose hidden states they are, or from which they are made."""
        with self._mixed():
            found = self._calls[batch][index].run(layer, hidden)
        made: Tensor = found[0] if isinstance(found, tuple | list) else found
        return made

    def origins(self, index: int) -> Origins:
        """Which linear layers on disk the layer's parameters are made of, without reading them."""
        inside, prefix = self._inside(index), self.layer_prefix(index)
        shapes = {name: self.files.entry(name).shape for name in self._names.stored(inside)}
        key = str(sorted((name.removeprefix(prefix), shape) for name, shape in shapes.items()))
        if key not in self._origins:
            with self.roomy(index):
                self._origins[key] = self._names.origins(shapes, inside, prefix)
        return self._origins[key]

    def shared_weights(self, index: int) -> set[str]:
        """The tensors on disk of which the layer is made that other parts of the model use as well, by the rest of
        their names."""
        inside, prefix = self._inside(index), self.layer_prefix(index)
        sources, stored = set(self._names.ties.values()), self._names.stored(inside)
        used = {name for name in stored if self._names.target[name] in sources or not name.startswith(prefix)}
        return {name.removeprefix(prefix) for name in used}

    def stored_module(self, index: int, module: str) -> str | None:
        """The name on disk of the layer's module with a weight, by the rest of the name; None if its weight is stored
        in another form or place."""
        inside, prefix = self._inside(index), self.layer_prefix(index)
        wanted = f"{inside}{module}.weight"
        found = [name for name, target in self._names.target.items() if target == wanted and self._names.plain([name])]
        fits = len(found) == 1 and found[0].startswith(prefix) and found[0].endswith(".weight")
        return found[0].removeprefix(prefix).removesuffix(".weight") if fits else None

    def owners(self, index: int | None = None) -> dict[str, tuple[nn.Module, Tensor, str]]:
        """Of the tensors on disk, by name: the module in memory that each becomes a part of, the parameter or buffer
        there, and its name. index: of the layer whose own are asked for; None: all."""
        inside, prefix = ("", "") if index is None else (self._inside(index), self.layer_prefix(index))
        strangers = set(self._names.strangers)
        return {
            name: (self.model.get_submodule(target.rpartition(".")[0]), tensor_at(self.model, target), target)
            for name, target in self._names.target.items()
            if target.startswith(inside) and name.startswith(prefix) and name not in strangers
        }

    def parameters(self, index: int) -> dict[str, Tensor]:
        """The layer's parameters, by name in memory; on the meta device unless it is loaded."""
        return dict(self._layers[index].named_parameters())

    def everything(self, index: int, layer: nn.Module, hidden: Tensor, batch: int = 0) -> list[Tensor]:
        """All that a pass through the layer makes, as `run`: what it returns, and what it leaves for other layers."""
        call = self._calls[batch][index]
        with self._mixed():
            found = call.run(layer, hidden)
        return [one for one in _tensors([found, call.kwargs, call.args]) if one.is_floating_point()]

    # ---- before and after them

    @torch.no_grad()
    def embed(self, batches: list[Tensor]) -> list[Tensor]:
        """The input of the first layer: int64 [rows, tokens] -> [rows, tokens, channels] for each batch."""
        self._calls, hidden = [], []
        with self._outside(embedding=True, matrices=self.dtype):
            for ids in batches:
                first, calls = self._record(ids.to(self.device))
                self._calls.append(_with_shared(calls, self._calls[-1] if self._calls else {}))
                hidden.append(first)
        self.order = list(self._calls[0])
        return hidden

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Load what follows the layers for the duration of the body: [rows, tokens, channels] -> logits [rows, tokens,
        vocabulary], by the model's own code.

        Memory: the output layer in its stored and in its product dtype, and the logits.
        """
        with self._outside(embedding=False, matrices=self.products):
            yield lambda hidden: self._tail(hidden).logits

    @contextmanager
    def states(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Load what lies between the last layer and the output layer for the duration of the body: [rows, tokens,
        channels] -> what the output layer reads."""
        found: list[Tensor] = []

        def read(x: Tensor) -> Tensor:
            found.append(x)
            raise _ReachedError

        def states(hidden: Tensor) -> Tensor:
            with replaced(self._output(), read), suppress(_ReachedError):
                self._tail(hidden)
            return found.pop()

        with self._outside(embedding=False, matrices=self.products, output=False):
            yield states

    def _output(self) -> nn.Module:
        found: nn.Module | None = self.model.get_output_embeddings()
        if found is None:
            raise TaskError(f"the {self.model.config.model_type} model has no output layer that reads hidden states")
        return found

    def _tail(self, hidden: Tensor) -> Any:
        """The model's output for what the last layer makes."""
        last = self.order[-1]
        ids = torch.zeros(hidden.shape[0], hidden.shape[1] - self._added, dtype=torch.long, device=self.device)

        def stand(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _shaped(self._form, hidden if index == last else Call.split(args, kwargs)[0])

        zeros = replaced(self.model.get_input_embeddings(), partial(embedded, self.model))
        with self._standing_in(stand), zeros, self._mixed():
            return self.model(input_ids=ids, use_cache=False)

    def _record(self, ids: Tensor) -> tuple[Tensor, dict[int, Call]]:
        """The first layer's hidden states for a batch, and what each layer is called with."""
        calls: dict[int, Call] = {}
        first: list[Tensor] = []

        def stand(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index in calls:
                raise TaskError(
                    f"the {self.model.config.model_type} model calls its decoder layer {index} more than once; its "
                    "layers cannot be pressed one by one"
                )
            given, calls[index] = Call.split(args, kwargs)
            if not first:
                first.append(given)
                self._added = given.shape[1] - ids.shape[1]
                if self._form is None:
                    self._form = self._returned(index, calls[index], given)
            return _shaped(self._form, given)

        base = self.model.base_model
        with self._standing_in(stand):
            (base if self._apart else self.model)(input_ids=ids, use_cache=False)
        if not first:
            raise TaskError(f"the {self.model.config.model_type} model calls none of its decoder layers for a text")
        return first[0], calls

    def _returned(self, index: int, call: Call, hidden: Tensor) -> tuple[Any, ...]:
        """The form of what a layer returns: a tuple with other things in it, empty for a tensor."""
        layer = self._layers[index]
        stand = layer.__dict__.pop("forward")
        with self.layer(index), self._mixed():
            found = call.run(layer, hidden)
        layer.forward = stand
        return tuple(found) if isinstance(found, tuple | list) else ()

    @contextmanager
    def _standing_in(self, stand: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """Call `stand` with its number and its arguments in place of each layer, whose other attributes stay."""
        for number, layer in enumerate(self._layers):
            layer.forward = lambda *args, _number=number, **kwargs: stand(_number, args, kwargs)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)

    # ---- weights

    @property
    def _apart(self) -> bool:
        """Whether the output layer lies outside the model that makes the hidden states, which can so run without it."""
        base, output = self.model.base_model, self.model.get_output_embeddings()
        return base is not self.model and all(module is not output for module in base.modules())

    @contextmanager
    def _outside(self, embedding: bool, matrices: torch.dtype, output: bool = True) -> Iterator[None]:
        """Load what a text passes through outside the layers for the duration of the body. embedding, output: those as
        well; the output layer with the embedding only where it cannot be left out."""
        output = output and not (embedding and self._apart)
        left = [self._inside(index) for index in range(len(self))] + self._towers()
        if not output:
            left += _paths(self.model, self.model.get_output_embeddings())
        if not embedding:
            left += self._embedding_paths()
        names = [name for name in self.model.state_dict() if not name.startswith(tuple(left))]
        sources = {self._names.ties.get(name, name) for name in names} | set(names)
        found = {name: self.files.read(name) for name, target in self._names.target.items() if target in sources}
        self._load(found, names, matrices)
        blank = [] if embedding else [n for n in self.model.state_dict() if tensor_at(self.model, n).is_meta]
        blank = [name for name in blank if name.startswith(tuple(self._embedding_paths()))]
        for name in blank:  # some models look at its numbers without calling it; these take no memory
            size = tensor_at(self.model, name).shape
            place(self.model, name, torch.zeros(1, dtype=self.dtype, device=self.device).expand(size))
        yield
        self._unload(names + blank)

    def _embedding_paths(self) -> list[str]:
        return _paths(self.model, self.model.get_input_embeddings())

    def _towers(self) -> list[str]:
        """The prefixes of models inside this one that are not the decoder, such as a vision tower."""
        from transformers import PreTrainedModel

        return [
            f"{name}."
            for name, module in self.model.named_modules()
            if name and isinstance(module, PreTrainedModel) and not f"{self._list}.".startswith(f"{name}.")
        ]

    def _inside(self, index: int) -> str:
        return f"{self._list}.{index}."

    def _load(self, stored: Mapping[str, Tensor], names: list[str], matrices: torch.dtype) -> None:
        """Give the model's tensors `names` their values. stored: by name on disk. TaskError if one has none."""
        values = self._names.values(stored, names)
        for name, tensor in values.items():
            if tensor.is_floating_point():
                tensor = tensor.to(self.device, matrices if tensor.dim() > 1 else self.dtype)
            place(self.model, name, in_own_storage(tensor.to(self.device)))
        if nowhere := self._names.nowhere(names, values):
            raise TaskError(
                f"the model's files do not hold {nowhere[0]}" + f" and {len(nowhere) - 1} more" * (len(nowhere) > 1)
            )

    def _unload(self, names: list[str]) -> None:
        for name in names:
            place(self.model, name, tensor_at(self.model, name).to("meta"))

    @contextmanager
    def _mixed(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.products != self.dtype:
                stack.enter_context(torch.autocast(self.device, self.products))
                if self.device == "cpu":
                    stack.enter_context(_ExactAttention(self.dtype))
            yield


class _ReachedError(Exception):
    """The output layer was reached, and nothing after it is of interest."""


def _tensors(found: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, Mapping):
        return [tensor for value in found.values() for tensor in _tensors(value)]
    return [tensor for value in found for tensor in _tensors(value)] if isinstance(found, list | tuple) else []


def _paths(model: nn.Module, module: nn.Module | None) -> list[str]:
    return [f"{name}." for name, one in model.named_modules() if one is module]


def _shaped(form: tuple[Any, ...] | None, hidden: Tensor) -> Any:
    """`hidden` as a layer would return it, what else it returns as it once was."""
    return (hidden, *form[1:]) if form else hidden


def _with_shared(calls: dict[int, Call], before: dict[int, Call]) -> dict[int, Call]:
    """The calls of a batch with the tensors of the batch before where they are equal, as masks and positions mostly
    are, so that they are in memory once. Only tuples are looked into: a layer may leave things in other containers."""
    same: dict[int, Any] = {}

    def shared(one: Any, two: Any) -> Any:
        if isinstance(one, tuple) and isinstance(two, tuple) and type(one) is tuple and len(one) == len(two):
            return tuple(shared(*pair) for pair in zip(one, two, strict=True))
        if not isinstance(one, Tensor):
            return one
        if id(one) not in same:
            equal = (
                isinstance(two, Tensor) and (one.dtype, one.shape) == (two.dtype, two.shape) and torch.equal(one, two)
            )
            same[id(one)] = two if equal else one
        return same[id(one)]

    found = {}
    for index, call in calls.items():
        other = before.get(index, call)
        kwargs = {key: shared(value, other.kwargs.get(key)) for key, value in call.kwargs.items()}
        found[index] = Call(call.name, shared(call.args, other.args), kwargs)
    return found


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
