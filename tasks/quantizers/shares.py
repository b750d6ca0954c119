"""Shares of a decoder layer that can be quantized apart, so that a large layer, such as one with many experts, is never
in memory as a whole, and several processes work on it.

No factor moves from one share to another, so the result does not depend on where they are cut. The cuts do not depend
on the machine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from tasks.activations.memory import gram_bytes
from tasks.model.structure import LayerStructure

LARGEST = 6_000_000_000  # bytes of a share's weights and Gram matrices, both float32


@dataclass(frozen=True)
class Share:
    """Linear layers of a decoder layer, and the tensors that are written with them.

    layer: the decoder layer's number; number: the share's in it; structure: of its linear layers alone; others: names
    of the layer's other tensors in this share, without the layer's prefix; whole: whether it is all of the layer.
    """

    layer: int
    number: int
    structure: LayerStructure
    others: tuple[str, ...]
    whole: bool

    @property
    def weights(self) -> int:
        """The weights of its linear layers."""
        return sum(linear.rows * linear.width for linear in self.structure.linears.values())

    @property
    def file(self) -> str:
        """The name of the file that it is written to."""
        return f"{self.structure.prefix}{'' if self.whole else f'{self.number:04}.'}safetensors"


def whole_layer(index: int, structure: LayerStructure, names: Iterable[str]) -> Share:
    """The layer as one share. names: of its stored tensors, without its prefix."""
    taken = {linear.tensor for linear in structure.linears.values()}
    return Share(index, 0, structure, tuple(name for name in names if name not in taken), True)


def shares(
    index: int,
    structure: LayerStructure,
    names: Iterable[str],
    solved: Collection[str],
    grouped: bool,
    largest: int = LARGEST,
) -> list[Share]:
    """The layer's shares, as few as hold at most `largest` bytes each, unless what belongs together has more.

    names: see `whole_layer`; solved: the linear layers that are quantized; grouped: whether factors move in which
    several channels follow one row.
    """
    all_in_one = whole_layer(index, structure, names)
    if {name for group in structure.groups for name in group} != structure.linears.keys():
        return [all_in_one]
    parts: list[list[list[str]]] = []
    size = 0
    for unit in _units(structure, solved, grouped):
        added = sum(_bytes(structure, group) for group in unit)
        if not parts or (size and size + added > largest):
            parts.append([])
            size = 0
        parts[-1] += unit
        size += added
    if len(parts) < 2:
        return [all_in_one]
    left = dict.fromkeys(all_in_one.others)
    found = []
    for number, groups in enumerate(parts):
        own = _only(structure, groups)
        near = [*own.linears, *(pair.source for pair in own.pairs)]
        mine = [name for name in left if any(name.startswith(f"{each}.") for each in near)]
        for name in mine:
            del left[name]
        found.append(Share(index, number, own, tuple(mine), False))
    return [replace(found[0], others=(*found[0].others, *left)), *found[1:]]


def _units(structure: LayerStructure, solved: Collection[str], grouped: bool) -> list[list[list[str]]]:
    """Groups of linear layers with the same input, those together between which factors move, and those of a stack
    that is written as it was, in their order."""
    joined = list(range(len(structure.groups)))
    of = {name: number for number, group in enumerate(structure.groups) for name in group}

    def root(number: int) -> int:
        while joined[number] != number:
            number = joined[number]
        return number

    def join(numbers: Iterable[int]) -> None:
        roots = sorted({root(number) for number in numbers})
        for other in roots[1:]:
            joined[other] = roots[0]

    norms: dict[str, list[int]] = {}
    for pair in structure.usable(grouped):
        together = [of[name] for name in (pair.source, *pair.readers) if name in of]
        join(together)
        norms.setdefault(pair.source, []).extend(together)
    for numbers in norms.values():
        join(numbers)
    stacks: dict[str, list[str]] = {}
    for name, linear in structure.linears.items():
        if linear.stacked and name in of:
            stacks.setdefault(linear.tensor, []).append(name)
    for inside in stacks.values():
        if not all(name in solved for name in inside):
            join(of[name] for name in inside)
    units: dict[int, list[list[str]]] = {}
    for number, group in enumerate(structure.groups):
        units.setdefault(root(number), []).append(group)
    return list(units.values())


def _only(structure: LayerStructure, groups: list[list[str]]) -> LayerStructure:
    """The structure of these groups alone."""
    names = [name for group in groups for name in group]
    return replace(
        structure,
        linears={name: structure.linears[name] for name in names},
        groups=groups,
        pairs=[pair for pair in structure.pairs if all(name in names for name in pair.readers)],
        left={},
        experts={name: kind for name, kind in structure.experts.items() if name in names},
    )


def _bytes(structure: LayerStructure, group: list[str]) -> int:
    linears = [structure.linears[name] for name in group]
    return 4 * sum(one.rows * one.width for one in linears) + gram_bytes([linears[0].width])
