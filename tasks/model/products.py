"""Hear every product of activations with a model's weights, whoever computes it.

A linear layer is a matrix inside a parameter, whatever module multiplies with it: `nn.Linear`, a transposed weight, one
expert of a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Slice:
    """A matrix inside a parameter. shape: (rows, width), rows being outputs; offset, strides: in numbers."""

    parameter: str
    offset: int
    shape: tuple[int, int]
    strides: tuple[int, int]

    def view(self, tensor: Tensor) -> Tensor:
        """The matrix in `tensor`, which is laid out like the parameter."""
        return torch.as_strided(tensor, self.shape, self.strides, self.offset)

    @property
    def place(self) -> int:
        """Its number in a stack of matrices of its size."""
        return self.offset // (self.shape[0] * self.shape[1])

    def stack(self, size: int) -> int:
        """The number of matrices of its size that fill its parameter of `size` numbers one after another; 1 if they do
        not, or if it fills it alone."""
        rows, width = self.shape
        one = rows * width
        fits = self.strides in ((width, 1), (1, rows)) and size % one == 0 and self.offset % one == 0
        return size // one if fits else 1

    def at(self, place: int) -> Slice:
        """The matrix at another place of the stack."""
        return replace(self, offset=place * self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Product:
    """One product: x [..., width] -> made [..., rows], a bias included. again: the same with another x."""

    weight: Slice
    x: Tensor
    made: Tensor
    again: Callable[[Tensor], Tensor]


Heard = Callable[[Product], "Tensor | None"]  # may return another tensor in place of `made`


class Products(TorchFunctionMode):
    """Within it, `heard` is called for every product with a matrix of the module's parameters."""

    def __init__(self, module: nn.Module, heard: Heard) -> None:
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): name for name, p in module.named_parameters() if p.dim() > 1}
        self._heard = heard

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        match getattr(func, "__name__", ""):
            case "linear":
                weight = args[1] if len(args) > 1 else kwargs["weight"]
                return self._hear(args[0], weight, made, lambda x: func(x, *args[1:], **kwargs))
            case "addmm":
                return self._hear(args[1], args[2].T, made, lambda x: func(args[0], x, *args[2:], **kwargs))
            case "matmul" | "mm" | "__matmul__" | "bmm" if len(args) == 2:
                return self._matmul(func, args[0], args[1], made)
            case "__rmatmul__" if len(args) == 2:
                return self._matmul(lambda a, b: func(b, a), args[1], args[0], made)
        return made

    def _matmul(self, func: Any, x: Tensor, weight: Tensor, made: Tensor) -> Tensor:
        if x.dim() == 2 and weight.dim() > 1 and self._name(x):  # W X: the weight stands left
            turned = self._hear(
                weight.transpose(-2, -1),
                x,
                made.transpose(-2, -1),
                lambda new: func(x, new.transpose(-2, -1)).transpose(-2, -1),
            )
            return turned.transpose(-2, -1)
        if not self._name(weight) or x.dim() < 2:
            return made
        if weight.dim() == 2:
            return self._hear(x, weight.T, made, lambda new: func(new, weight))
        if weight.dim() == 3 and x.dim() == 3 and len(x) == len(weight):
            own = zip(x, weight, made, strict=True)
            return torch.stack([self._hear(one, matrix.T, out, partial(_times, matrix)) for one, matrix, out in own])
        return made

    def _name(self, weight: Any) -> str | None:
        if not isinstance(weight, Tensor) or weight.is_meta:
            return None
        return self._names.get(weight.untyped_storage().data_ptr())

    def _hear(self, x: Tensor, weight: Tensor, made: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
        name = self._name(weight)
        if name is None or not x.numel():
            return made
        with torch._C.DisableTorchFunction():
            offset, strides = int(weight.storage_offset()), (int(weight.stride(0)), int(weight.stride(1)))
            found = Slice(name, offset, (weight.shape[0], weight.shape[1]), strides)
            new = self._heard(Product(found, x, made, again))
        return made if new is None else new


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    return x @ matrix


class Readers:
    """Tells the distinct tensors that are read in a pass: views of the same numbers are one."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}  # holds tensors, so that no other takes their place

    def first(self, x: Tensor, reader: Any) -> Any:
        """The first reader of this tensor; `reader` if there is none."""
        key = (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x.shape[-1], x._version)
        return self._seen.setdefault(key, (x, reader))[1]

    def clear(self) -> None:
        """Start another pass."""
        self._seen.clear()
