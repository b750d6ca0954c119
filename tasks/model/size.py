"""The bits that a weight of a pressed model takes on disk."""

from __future__ import annotations

from pathlib import Path

from tasks.formats.stored import StoredModel


def weight_bits(directory: Path) -> float | None:
    """Bits that a weight of the decoder's linear layers takes on disk, with scales, zero points and layers left alone.

    None where the directory holds neither safetensors nor GGUF.
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
