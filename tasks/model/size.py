"""The bits that a weight of a pressed model takes on disk."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader
from safetensors import safe_open


def weight_bits(directory: Path) -> float | None:
    """Bits a weight of the decoder's linear layers takes on disk: scales, zero points and layers left alone counted.

    None where the directory holds neither safetensors nor GGUF.
    """
    bits, weights = 0, 0
    for path in sorted(directory.glob("*.gguf")):
        for packed in GGUFReader(path).tensors:
            if packed.name.startswith("blk.") and len(packed.shape) > 1:
                bits += 8 * int(packed.n_bytes)
                weights += int(packed.n_elements)
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for name in names:
                stem, _, kind = name.rpartition(".")
                if ".layers." not in name or kind == "weight_shape":
                    continue
                tensor = tensors.get_slice(name)
                shape, size = tensor.get_shape(), 8 * _WIDTH[tensor.get_dtype()]
                count = 1
                for length in shape:
                    count *= length
                if len(shape) < 2:
                    continue
                bits += count * size
                if kind == "weight":
                    weights += count
                elif kind == "weight_packed":
                    rows, columns = tensors.get_tensor(f"{stem}.weight_shape").tolist()
                    weights += rows * columns
                elif kind == "qweight":
                    weights += count * 8
    return round(bits / weights, 3) if weights else None


_WIDTH = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "BOOL": 1,
}
