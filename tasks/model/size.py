"""The bits per weight of a quantized model on disk."""

from __future__ import annotations

from pathlib import Path

from tasks.formats.stored import StoredModel


def weight_bits(directory: Path) -> float | None:
    """Bits per weight on disk of the decoder's linear layers, including scales, zero points and unquantized layers.

    None if the directory contains neither safetensors nor GGUF.
    """
    bits = weights = 0
    if packed := sorted(directory.glob("*.gguf")):
        from gguf import GGUFReader

        for tensor in (tensor for path in packed for tensor in GGUFReader(path).tensors):
            if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
                bits += 8 * int(tensor.n_bytes)
                weights += int(tensor.n_elements)
        return round(bits / weights, 3) if weights else None
    return StoredModel(directory).bits_per_weight() if any(directory.glob("*.safetensors")) else None
