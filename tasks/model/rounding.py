"""Round the inputs of linear layers to 8 bits, whoever computes with their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from tasks.activation_rounding import Activations, dequantized
from tasks.errors import TaskError
from tasks.model.products import Product, Products, Slice

Holds = Callable[[Slice], list[str]]  # the linear layers, by name on disk, whose rows a matrix in memory holds


@contextmanager
def rounded_products(module: nn.Module, holds: Holds, symmetric: Mapping[str, bool]) -> Iterator[None]:
    """Quantize and dequantize what the linear layers in `symmetric` read, each token for itself. symmetric: by name on
    disk, how. TaskError if a matrix in memory holds layers that are rounded in different ways."""
    if not symmetric:
        yield
        return
    ways = {way: Activations(way) for way in set(symmetric.values())}
    known: dict[Slice, Activations | None] = {}

    def on(product: Product) -> Tensor | None:
        if product.weight not in known:
            names = list(dict.fromkeys(holds(product.weight)))
            asked = {symmetric.get(name) for name in names}
            if len(asked) > 1:
                raise TaskError(
                    f"{' and '.join(names[:3])} are one matrix in memory, but their inputs are rounded in different "
                    "ways"
                )
            way = asked.pop() if asked else None
            known[product.weight] = None if way is None else ways[way]
        rounding = known[product.weight]
        return None if rounding is None else product.again(dequantized(rounding, product.x))

    with Products(module, on):
        yield
