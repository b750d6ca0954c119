"""The memory that the pass over the calibration tokens takes."""

from __future__ import annotations

from collections.abc import Sequence

PREDICTED = 128  # tokens whose predictions importance.py holds at once; here, where nothing imports torch


def needed_bytes(
    tokens: int,
    sequence_length: int,
    widths: Sequence[int],
    vocabulary: int,
    layer_parameters: int,
    importance: bool,
    device: str,
    product: int,
) -> int:
    """The memory, bytes, that the pass takes beyond what the process holds: all activations twice, and the most of

    - the embedding, as it is stored and as float32,
    - one layer's weights as they are stored and as they are multiplied with, its Gram matrices, and what one sequence
      passes through inside the layer,
    - where tokens are weighed, the output layer as those, and the predictions of `PREDICTED` tokens five times over.

    Where tokens are weighed, what a sequence leaves inside a layer for the way back comes on top, for the process does
    not give it back: three times what it passes through. What is stored is in the processor's memory: on a GPU, whose
    memory is meant there, it does not count.

    widths: of the distinct inputs in a layer; the first is that of the layer itself. product: bytes of a weight in a
    matrix product.
    """
    hidden, inner = widths[0], max(widths)
    activations = tokens * hidden
    sequence = sequence_length * (3 * inner + 8 * hidden)
    grams = sum(width**2 for width in widths)
    stored = 0 if device == "cuda" else 2
    weight = stored + product
    most = max((stored + 4) * vocabulary * hidden, weight * layer_parameters + 4 * (grams + sequence))
    if importance:
        most = max(most, weight * vocabulary * hidden + 20 * PREDICTED * vocabulary) + 12 * sequence
    return int(8 * activations + most)
