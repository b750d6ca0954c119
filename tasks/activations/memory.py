"""Memory and disk space of the pass over the calibration tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

EXPERT_TOKENS = 128  # default of statistics.expert_tokens
GRAM_GIGABYTES = 64.0  # default of statistics.gram_gigabytes
PREDICTED = 128  # tokens whose predictions importance.py holds at once; defined here to avoid an import of torch


def needed_bytes(
    tokens: int,
    sequence_length: int,
    widths: Sequence[int],
    vocabulary: int,
    layer_parameters: int,
    importance: bool,
    device: str,
    product: int,
    kept: bool = True,
) -> int:
    """The additional memory of the pass, in bytes: all activations twice, and the maximum of

    - the embedding, as stored and as float32,
    - one layer's weights, as stored and in the product dtype, its Gram matrices, and the activations of one sequence
      inside the layer,
    - with token weights, the output layer, likewise twice, and the predictions of `PREDICTED` tokens five times.

    With token weights, add three times the activations of one sequence inside a layer: they are saved for the backward
    pass, and the process does not return their memory. Stored weights are in CPU memory: with a GPU, where the result
    is GPU memory, they do not count.

    widths: of the distinct inputs in a layer; the first is the layer's own. product: bytes per weight in a matrix
    product. kept: whether Gram matrices are summed.
    """
    hidden, inner = widths[0], max(widths)
    activations = tokens * hidden
    sequence = sequence_length * (3 * inner + 8 * hidden)
    grams = sum(width**2 for width in widths) if kept else 0
    stored = 0 if device == "cuda" else 2
    weight = stored + product
    most = max((stored + 4) * vocabulary * hidden, weight * layer_parameters + 4 * (grams + sequence))
    if importance:
        most = max(most, weight * vocabulary * hidden + 20 * PREDICTED * vocabulary) + 12 * sequence
    return int(8 * activations + most)


def gram_bytes(widths: Iterable[int]) -> int:
    """The size, bytes, of the Gram matrices of inputs with these widths."""
    return sum(4 * width**2 for width in widths)


def grams_kept(grams: int, gigabytes: float) -> bool:
    """Whether `grams` bytes of Gram matrices are kept on disk, with a limit of so many gigabytes."""
    return grams <= gigabytes * 1e9


def stored_bytes(widths: Sequence[int], hidden: int, weights: int, rows: int = 0) -> int:
    """The numbers, bytes, that the pass leaves: of each distinct input, by width, its Gram matrix and two magnitudes by
    channel, and `weights` of tokens. rows: bytes of what the layers read, where that is kept in place of the Gram
    matrices. hidden: of the output layer, whose Gram matrix is always kept."""
    grams = [hidden] if rows else [*widths, hidden]
    return gram_bytes(grams) + 8 * (sum(widths) + hidden) + 4 * weights + rows


def rows_bytes(tokens: int, layers: int, hidden: int, importance: bool) -> int:
    """The size, bytes, of what the layers read."""
    return tokens * hidden * layers * (2 if importance else 4)


def again_bytes(tokens: int, hidden: int, layer_parameters: int, product: int, grams: int) -> int:
    """The memory, bytes, that summing a layer's Gram matrices again takes: the layer, as stored and in the product
    dtype, what it reads, and `grams` bytes of them."""
    return (2 + product) * layer_parameters + 8 * tokens * hidden + grams


def kept_bytes(tokens: int, layers: int, hidden: int, importance: bool) -> int:
    """The disk, bytes, that it takes besides while it runs: activations, and gradients where tokens are weighed."""
    return tokens * hidden * (2 * (layers + 1) if importance else 4)
