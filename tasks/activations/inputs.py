"""The statistics of a layer's inputs for a quantizer: read from files, or summed again as the text streams past.

Gram matrices grow with the square of the width: those of a large model take more disk than the model. Then the
statistics stage keeps what each layer reads and the tokens' weights in place of them (store.py), and the sums are made
here, by the same code from the same numbers, so to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from tasks.activations.gram import OtherTokensError, Sums, fill_experts, recording_inputs
from tasks.activations.importance import load_importance
from tasks.activations.store import (
    ROWS,
    Input,
    hidden_file,
    load_few,
    load_readers,
    load_text,
    read_input,
    read_magnitudes,
    sums_again,
)
from tasks.errors import TaskError
from tasks.model.decoder import Decoder
from tasks.model.structure import LayerStructure, read_structure

AT_ONCE = 4_000_000_000  # bytes of Gram matrices in memory, beside the one in use; the results do not depend on it

Change = Callable[[Input], Input]


class Inputs(Mapping[str, Input]):
    """The statistics of linear layers' inputs, by linear layer. groups: of linear layers with the same input. Each
    input is made when it is asked for, and only the last one is kept."""

    def __init__(
        self, groups: list[list[str]], read: Callable[[str], Input], changes: Mapping[str, tuple[Change, ...]] = {}
    ) -> None:
        self.groups = groups
        self._read, self._changes = read, changes
        self._first = {name: group[0] for group in groups for name in group}
        self._last: tuple[str, Input] | None = None

    @classmethod
    def of(cls, known: Mapping[str, Input], groups: list[list[str]]) -> Inputs:
        """Those that are in memory, by the first of each group."""
        return cls(groups, lambda first: known[first])

    def __getitem__(self, name: str) -> Input:
        first = self._first[name]
        if self._last is None or self._last[0] != first:
            self._last = None  # frees its memory
            found = self._read(first)
            for change in self._changes.get(first, ()):
                found = change(found)
            self._last = first, found
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __len__(self) -> int:
        return len(self._first)

    def changed(self, linears: list[str], change: Change) -> Inputs:
        """These inputs, with a change of those that `linears` read."""
        firsts = {self._first[name] for name in linears}
        changes = {first: (*self._changes.get(first, ()), change) for first in firsts}
        return Inputs(self.groups, self._read, {**self._changes, **changes})


def read_inputs(directory: Path, model: Path, layer: int, device: str, wanted: Collection[str] | None = None) -> Inputs:
    """The statistics of each linear layer's input in decoder layer `layer`, from `directory`, where the statistics
    stage wrote them. model: that they are of; wanted: first readers of inputs, None: all. TaskError if there are none,
    or, when they are read, if the text takes other ways through the layer on this machine."""
    known = load_readers(directory, layer)
    readers = {first: names for first, names in known.items() if wanted is None or first in wanted}
    if sums_again(directory):
        return Inputs([*readers.values()], _Again(directory, model, layer, device, [*readers]).read)
    return Inputs([*readers.values()], lambda first: read_input(directory, layer, first, device))


class _Again:
    """Sums the Gram matrices of a layer's inputs from what the layer reads, as many at a time as `AT_ONCE` holds."""

    def __init__(self, directory: Path, model: Path, layer: int, device: str, wanted: list[str]) -> None:
        self._directory, self._model, self._layer = directory, model, layer
        self._device = torch.device(device)
        self._weights = load_importance(directory, layer, device)
        self._few = load_few(directory, layer)
        self._wanted = wanted
        self._held: dict[str, Input] = {}
        self._shared: dict[tuple[str, ...], Sums] = {}

    @cached_property
    def _decoder(self) -> Decoder:
        return _reader(self._directory, self._model, str(self._device))[0]

    @cached_property
    def _structure(self) -> LayerStructure:
        return _reader(self._directory, self._model, str(self._device))[1][self._layer]

    def read(self, first: str) -> Input:
        """The input with this first reader; those that follow it are summed in the same pass."""
        if first not in self._held:
            self._held = {}
            names = next(part for part in self._parts(self._wanted) if first in part)
            sums = self._sums(names)
            fill_experts(sums, self._structure, self._few, self._device, True, names, self._over_experts)
            self._held = {name: self._input(name, sums[name]) for name in names}
        return self._held[first]

    def _parts(self, names: list[str]) -> Iterator[list[str]]:
        """Consecutive ones whose Gram matrices fit in memory together."""
        part: list[str] = []
        size = 0
        for name in names:
            own = 4 * self._structure.linears[name].width ** 2
            if part and size + own > AT_ONCE:
                yield part
                part, size = [], 0
            part.append(name)
            size += own
        yield part

    @torch.no_grad()
    def _sums(self, names: Collection[str]) -> dict[str, Sums]:
        """The sums of these inputs over the text."""
        rows = load_file(hidden_file(self._directory, self._layer), device=str(self._device))[ROWS].split(1)
        origins = self._decoder.origins(self._layer)
        recording = partial(recording_inputs, structure=self._structure, origins=origins, weights=self._weights)
        try:
            with self._decoder.layer(self._layer) as layer, recording(layer, wanted=names) as sums:
                for number, hidden in enumerate(rows):
                    self._decoder.run(self._layer, layer, hidden.float(), number)
            for name, own in sums.items():
                if name in self._weights and self._weights[name].numel() != own.tokens:
                    raise OtherTokensError(name)
        except OtherTokensError as error:
            raise TaskError(
                f"{self._structure.prefix}{error} reads other tokens here than when its statistics were made, perhaps "
                "because this is another kind of processor; run both stages on the same kind, or raise "
                "statistics.gram_gigabytes"
            ) from error
        return sums

    def _over_experts(self, names: list[str]) -> Sums:
        """The sums over all these experts."""
        key = tuple(names)
        if key not in self._shared:
            self._shared[key] = Sums.over(
                sums[name] for part in self._parts(names) for sums in [self._sums(part)] for name in part
            )
        return self._shared[key]

    def _input(self, name: str, sums: Sums) -> Input:
        """With the magnitudes of the statistics stage."""
        magnitudes = read_magnitudes(self._directory, self._layer, name, str(self._device))
        return Input(sums.tensors()["gram"], *magnitudes)


@lru_cache(maxsize=1)
def _reader(directory: Path, model: Path, device: str) -> tuple[Decoder, list[LayerStructure]]:
    """The model that has read the text, as in the statistics stage."""
    tokens, products = load_text(directory)
    decoder = Decoder(model, torch.float32, device, products)
    decoder.embed(list(tokens.split(1)))
    return decoder, read_structure(directory)
