"""safetensors files: read headers and tensors, convert precision, join files, with one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from tasks.errors import TaskError
from tasks.output import write_json

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # torch's names: safetensors' names
LARGEST = 5 * 10**9  # bytes per weight file
OUTPUT, EMBEDDING = "lm_head", "model.embed_tokens"  # names in transformers, outside the decoder layers
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True)
class Entry:
    """One tensor as the header of a safetensors file describes it; `bytes` is its length in the file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def count(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """Read the entry of every tensor by name; TaskError if the file is not a complete safetensors file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size - 8:
                raise ValueError("its header is truncated")
            header = json.loads(file.read(length))
        entries = {
            name: Entry(t["dtype"], tuple(t["shape"]), t["data_offsets"][1] - t["data_offsets"][0])
            for name, t in header.items()
            if name != "__metadata__"
        }
        if 8 + length + sum(e.bytes for e in entries.values()) != path.stat().st_size:
            raise ValueError("its length does not match its header")
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TaskError(f"{path} is not a complete safetensors file ({error}); fetch or save it again") from error
    return entries


def needs_conversion(path: Path, dtype: str) -> bool:
    """Whether any floating-point tensor of the file has another dtype than `dtype`, a key of `DTYPES`."""
    return any(e.dtype in BYTES and e.dtype != DTYPES[dtype] for e in read_header(path).values())


def convert(source: Path, destination: Path, dtype: str, names: Collection[str]) -> None:
    """Write the tensors `names` of `source` to `destination`, the floating-point ones as `dtype` (a key of `DTYPES`).

    TaskError if a finite weight has no finite value in `dtype`.
    """
    import torch

    wanted = DTYPES[dtype]
    new = {
        name: Entry(wanted, e.shape, e.count * BYTES[wanted]) if e.dtype in BYTES else e
        for name, e in read_header(source).items()
        if name in names
    }
    with safe_open(source, framework="pt") as file:

        def read(name: str) -> Tensor:
            tensor: Tensor = file.get_tensor(name)
            if new[name].dtype != wanted:
                return tensor
            converted = tensor.to(dtype=getattr(torch, dtype))
            if tensor.isfinite().all() and not converted.isfinite().all():
                raise TaskError(
                    f"{name} has weights up to {tensor.abs().max().item():.3g}, too large for {dtype}; "
                    "set model.dtype to bfloat16 or float32"
                )
            return converted

        _write(destination, new, read)


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file

    begun = path.with_suffix(".begun")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, begun, metadata)
    begun.replace(path)


def join(parts: Sequence[Path], destination: Path, largest: int = LARGEST) -> None:
    """Write the tensors of all `parts` to the folder `destination` as a model's weights, one in memory at a time:
    `model.safetensors`, or shards with an index if it would exceed `largest` bytes."""
    found = {name: (part, entry) for part in parts for name, entry in read_header(part).items()}
    shards = _shards({name: entry for name, (_, entry) in found.items()}, largest)

    def read(name: str) -> Tensor:
        with safe_open(found[name][0], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        total = sum(entry.bytes for _, entry in found.values())
        place = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(
            destination / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": place}
        )
    for file, shard in zip(files, shards, strict=True):
        _write(destination / file, shard, read)


def joined_bytes(entries: Mapping[str, Entry]) -> int:
    """The size of the files, bytes, that `join` writes of these tensors."""
    return sum(len(_header(_ordered(one))) + sum(e.bytes for e in one.values()) for one in _shards(entries, LARGEST))


def write_hollow(destination: Path, entries: Mapping[str, Entry]) -> None:
    """A safetensors file with these tensors in its header and a hole in place of their numbers: it takes no disk."""
    header = _header(_ordered(entries))
    with destination.open("wb") as out:
        out.write(header)
        out.truncate(len(header) + sum(e.bytes for e in entries.values()))


def _shards(entries: Mapping[str, Entry], largest: int) -> list[dict[str, Entry]]:
    """The tensors of each file."""
    shards: list[dict[str, Entry]] = [{}]
    held = 0  # bytes of the last one
    for name, entry in entries.items():
        if shards[-1] and held + entry.bytes > largest:
            shards.append({})
            held = 0
        shards[-1][name] = entry
        held += entry.bytes
    return shards


def _ordered(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """In safetensors' own order: wide types first, so that every tensor stays aligned."""
    order = sorted(entries, key=lambda name: (-entries[name].bytes // max(entries[name].count, 1), name))
    return {name: entries[name] for name in order}


def _write(destination: Path, entries: dict[str, Entry], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file of these tensors, reading one at a time."""
    import torch

    ordered = _ordered(entries)
    with destination.open("wb") as out:
        out.write(_header(ordered))
        for name in ordered:
            out.write(read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header(entries: dict[str, Entry]) -> bytes:
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, e in entries.items():
        described[name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [offset, offset + e.bytes]}
        offset += e.bytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class TensorFiles:
    """The tensors of a model directory by name, read on demand."""

    def __init__(self, directory: Path) -> None:
        self._file: dict[str, Path] = {}
        self._entry: dict[str, Entry] = {}
        for path in sorted(directory.glob("*.safetensors")):
            header = read_header(path)
            self._entry |= header
            self._file |= dict.fromkeys(header, path)
        if not self._file:
            raise TaskError(f"{directory} holds no safetensors files; run the download stage: modelpress run")

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def entry(self, name: str) -> Entry:
        """Dtype, shape and size of a tensor, without reading it. KeyError if there is no such tensor."""
        return self._entry[name]

    def read(self, name: str) -> Tensor:
        """Read a tensor as stored. KeyError if there is no such tensor."""
        with safe_open(self._file[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def names_below(self, prefix: str) -> list[str]:
        """The tensors whose names start with `prefix`, by the rest of the name."""
        return [name.removeprefix(prefix) for name in self if name.startswith(prefix)]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Read the tensors of `names_below`."""
        return {name: self.read(prefix + name) for name in self.names_below(prefix)}
