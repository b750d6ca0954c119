"""Hear what the linear layers of a decoder layer read, by their names on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tasks.model.products import Product, Products, Readers, Slice

if TYPE_CHECKING:
    from torch import nn

    from tasks.model.linears import Origins
    from tasks.model.structure import LayerStructure

Hear = Callable[[str, list[str], Product], None]


@contextmanager
def hearing(layer: nn.Module, structure: LayerStructure, origins: Origins, hear: Hear) -> Iterator[None]:
    """Within it, `hear(first, names, product)` is called for every product in the layer. names: the linear layers that
    the product's matrix holds; first: the first linear layer that read the same input in this pass."""
    names: dict[Slice, list[str]] = {}
    readers = Readers()

    def on(product: Product) -> None:
        if product.weight not in names:
            names[product.weight] = [name for name in origins.holds(product.weight) if name in structure.linears]
        if own := names[product.weight]:
            hear(readers.first(product.x, own[0]), own, product)

    handle = layer.register_forward_hook(lambda *_: readers.clear())
    with Products(layer, on):
        yield
    handle.remove()
