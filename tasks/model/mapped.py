"""Large tensors in files in place of memory, for a decoder layer that may not fit: of a mixture with many experts the
system then keeps those in memory that are in use.

Nothing else changes: such a tensor has an address, strides and a storage like any other.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

LAYER = 8_000_000_000  # bytes of a layer in float32 from which its tensors are put into files
LARGE = 1 << 22  # bytes of such a tensor
FOLDER = Path(".modelpress/mapped")

_aten = torch.ops.aten
_JOINED = {_aten.cat.default: _aten.cat.out, _aten.stack.default: _aten.stack.out}
_COPIED = (_aten.clone.default, _aten._to_copy.default)


def in_memory(parameters: int, device: str) -> int:
    """How many of a layer's parameters are in memory when it runs: all, or few at a time of files, counted as none."""
    return parameters if device != "cpu" or 4 * parameters <= LAYER else 0


def file_bytes(parameters: int, device: str) -> int:
    """The disk, bytes, that a layer's tensors take at most while it is examined and runs: its weights, and two copies
    with which factors are proven."""
    return 0 if in_memory(parameters, device) else 12 * parameters


class Mapped(TorchDispatchMode):
    """Within it, large tensors that are joined, copied or converted on the CPU are put into files below `folder`, which
    take disk only as long as the tensors exist."""

    def __init__(self, folder: Path = FOLDER) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _JOINED and func not in _COPIED:
            return func(*args, **kwargs)
        given = [one for one in pytree.tree_leaves(args) if isinstance(one, Tensor)]
        devices = {one.device.type for one in given} | {torch.device(kwargs.get("device") or "cpu").type}
        if devices != {"cpu"} or sum(one.numel() for one in given) * 8 < LARGE:
            return func(*args, **kwargs)
        blank = pytree.tree_map_only(Tensor, lambda one: torch.empty_like(one, device="meta"), args)
        made = func(*blank, **(kwargs | ({"device": "meta"} if kwargs.get("device") else {})))
        if made.numel() * made.itemsize < LARGE:
            return func(*args, **kwargs)
        out = self._place(made)
        if func in _COPIED:
            out.copy_(args[0])
        else:
            _JOINED[func](*args, **kwargs, out=out)
        return out

    def _place(self, like: Tensor) -> Tensor:
        """A tensor in a file, which has no name any more, with the form of `like`."""
        handle, name = tempfile.mkstemp(dir=self._folder)
        os.close(handle)
        try:
            flat = torch.from_file(name, shared=True, size=like.numel(), dtype=like.dtype)
        finally:
            os.unlink(name)
        return flat.as_strided(like.size(), like.stride())
