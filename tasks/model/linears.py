"""The linear layers of a decoder layer: what they are called and how their weights are stored.

Names are those on disk: `self_attn.q_proj` is stored as `self_attn.q_proj.weight`. Of a tensor that stacks several
matrices, as for the experts of a mixture, each is a linear layer of its own: the third matrix of
`mlp.experts.gate_up_proj` is `mlp.experts.2.gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.model.products import Slice

WEIGHT = ".weight"
FEWEST, NARROWEST = 8, 16  # rows, and width, of a matrix that is worth pressing


@dataclass(frozen=True)
class Linear:
    """A linear layer as stored. tensor: the stored tensor with its weight; start, count: the rows of that tensor, as a
    matrix whose last dimension is the tensor's, and shape: its own; transposed: whether these rows are the layer's
    inputs, not its outputs; stacked: whether the tensor holds several layers."""

    tensor: str
    start: int
    count: int
    transposed: bool
    stacked: bool
    shape: tuple[int, ...]

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Linear:
        """From its fields as JSON has them."""
        return cls(**{**values, "shape": tuple(values["shape"])})

    @property
    def columns(self) -> int:
        """The last dimension of the stored tensor."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Its outputs."""
        return self.columns if self.transposed else self.count

    @property
    def width(self) -> int:
        """Its inputs."""
        return self.count if self.transposed else self.columns

    @property
    def name(self) -> str:
        """Its name; that of a matrix in a stack has the number of the matrix before the last part."""
        stem = self.tensor.removesuffix(WEIGHT)
        if not self.stacked:
            return stem
        parent, _, own = stem.rpartition(".")
        return f"{parent}.{self.start // self.count}.{own}"

    def weight(self, stored: Tensor) -> Tensor:
        """[rows, width] from the stored tensor."""
        found = stored.flatten(0, -2)[self.start : self.start + self.count]
        return found.T.contiguous() if self.transposed else found


def why_left(linear: Linear, experts: set[int], shared: set[str]) -> str:
    """Why a linear layer stays in full precision; empty if it does not.

    experts: numbers of experts in its decoder layer; shared: tensors on disk that other parts of the model use.
    """
    last = linear.tensor.removesuffix(WEIGHT).split(".")
    if linear.tensor in shared:
        return "other parts of the model share its weights"
    if experts and not linear.stacked and (linear.rows in experts or "router" in last or last[-1] == "gate"):
        return "it routes tokens to experts"
    if linear.rows < FEWEST:
        return f"it has only {linear.rows} rows"
    if linear.width < NARROWEST:
        return f"it has only {linear.width} inputs"
    if not linear.stacked and not linear.tensor.endswith(WEIGHT):
        return "it is not stored as the weight of a module"
    return ""


def split(stored: Mapping[str, Tensor], linears: Mapping[str, Linear]) -> dict[str, Tensor]:
    """Stored tensors with each linear layer's weight as NAME.weight, [rows, width], in place of the tensor that holds
    it. `linears` hold all matrices of a stack or none."""
    taken = {linear.tensor for linear in linears.values()}
    found = {name: tensor for name, tensor in stored.items() if name not in taken}
    return found | {f"{name}{WEIGHT}": linear.weight(stored[linear.tensor]) for name, linear in linears.items()}


def join(tensors: Mapping[str, Tensor], linears: Mapping[str, Linear]) -> dict[str, Tensor]:
    """The inverse of `split`, for those of the linear layers whose weights are in `tensors`."""
    there = {name: linear for name, linear in linears.items() if f"{name}{WEIGHT}" in tensors}
    weights = {f"{name}{WEIGHT}" for name in there}
    found = {name: tensor for name, tensor in tensors.items() if name not in weights}
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, linear in there.items():
        weight = tensors[f"{name}{WEIGHT}"]
        parts.setdefault(linear.tensor, []).append((linear.start, weight.T if linear.transposed else weight))
    shapes = {linear.tensor: linear.shape for linear in there.values()}
    for stored, own in parts.items():
        ordered = [weight for _, weight in sorted(own, key=lambda part: part[0])]
        found[stored] = (ordered[0] if len(ordered) == 1 else torch.cat(ordered)).reshape(shapes[stored])
    return found


@dataclass(frozen=True)
class Piece:
    """Rows of a matrix in memory that are rows of one linear layer. places: in the matrix; rows: in the layer."""

    linear: Linear
    places: Tensor
    rows: Tensor


class Origins:
    """Which linear layer each row of a layer's matrices in memory belongs to.

    Found by putting numbers in the place of the weights: `rows` and `columns` are the layer's parameters, by name in
    memory, made by Transformers' conversions from stored tensors (`shapes`, in this order) whose numbers are their
    rows, counted through all tensors, and their columns.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]
    ):
        self._shapes = {name: shape for name, shape in shapes.items() if len(shape) > 1}
        self._lines = {name: _lines(rows[name], columns[name]) for name in rows if rows[name].dim() > 1}
        counts = [torch.Size(shape[:-1]).numel() for shape in self._shapes.values()]
        self._starts = torch.tensor([0, *counts]).cumsum(0)

    @staticmethod
    def numbered(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The stored tensors with the numbers of their rows, and with those of their columns, as float32, which is
        exact below 2^24."""
        rows, columns, start = {}, {}, 0
        for name, shape in shapes.items():
            if len(shape) < 2:
                rows[name] = columns[name] = torch.zeros(shape)
                continue
            count = torch.Size(shape[:-1]).numel()
            numbers = torch.arange(start, start + count, dtype=torch.float32)
            rows[name] = numbers.reshape(shape[:-1])[..., None].expand(shape)  # takes no memory
            columns[name] = torch.arange(shape[-1], dtype=torch.float32).expand(shape)
            start += count
        return rows, columns

    def holds(self, found: Slice) -> list[str]:
        """The names of these linear layers."""
        return list(dict.fromkeys(piece.linear.name for piece in self.pieces(found)))

    def pieces(self, found: Slice) -> list[Piece]:
        """The linear layers whose rows the matrix in memory holds; empty if its rows are those of none."""
        lines = self._lines.get(found.parameter)
        (rows, width), length = found.shape, 0 if lines is None else lines.length
        if lines is None or found.offset % length:
            return []
        first = found.offset // length
        whole = rows * width == len(lines.rows) * length
        if found.strides == (length, 1) and width == length:
            own = slice(first, first + rows)
            if not lines.turned:
                return self._split(lines.rows[own], None, found.shape, whole)
            if bool((lines.rows[own] == lines.rows[first]).all()):
                return self._split(lines.rows[first] + torch.arange(width), lines.columns[own], found.shape, whole)
        if found.strides == (1, length) and rows == length:
            own = slice(first, first + width)
            if not lines.turned:
                return self._split(lines.rows[own], torch.arange(rows), found.shape, whole)
            alike = bool((lines.rows[own] == lines.rows[first]).all())
            if alike and torch.equal(lines.columns[own], torch.arange(width)):
                return self._split(lines.rows[first] + torch.arange(rows), None, found.shape, whole)
        return []

    def _split(self, rows: Tensor, columns: Tensor | None, shape: tuple[int, int], whole: bool) -> list[Piece]:
        """rows: stored rows of a matrix, counted through all tensors. columns: of a transposed matrix, the stored
        column of each of its rows."""
        names = list(self._shapes)
        of = torch.searchsorted(self._starts, rows.contiguous(), right=True) - 1
        found = []
        for number in of.unique().tolist():
            size = self._shapes[names[number]]
            inside = rows[of == number] - self._starts[number]
            # of a stack, or where a part of a flat parameter is read, each matrix is a layer
            count = size[-2] if len(size) > 2 else (torch.Size(size[:-1]).numel() if whole else len(inside))
            for block in (inside // count).unique().tolist():
                own = inside[inside // count == block] - block * count
                stacked = len(size) > 2 or count != size[0]
                linear = Linear(names[number], block * count, count, columns is not None, stacked, size)
                if columns is None:
                    places = ((of == number).nonzero().flatten())[inside // count == block]
                    found.append(Piece(linear, places, own))
                elif len(own) == count and torch.equal(own, torch.arange(count)):
                    found.append(Piece(linear, torch.arange(shape[0]), columns))
        return found


@dataclass(frozen=True)
class _Lines:
    """What a parameter's lines, along its last dimension of `length`, hold of the stored tensors. Of a line the row,
    and all columns in order; or, `turned`, the column, and rows in order from the row."""

    rows: Tensor
    columns: Tensor
    length: int
    turned: bool


def _lines(rows: Tensor, columns: Tensor) -> _Lines | None:
    """From the numbers of rows and columns in a parameter; None if its lines are neither."""
    length = rows.shape[-1]
    row, column = rows.reshape(-1, length), columns.reshape(-1, length)
    order = torch.arange(length, dtype=rows.dtype)
    if bool((row == row[:, :1]).all()) and bool((column == order).all()):
        return _Lines(row[:, 0].long(), column[:, 0].long(), length, turned=False)
    if bool((column == column[:, :1]).all()) and bool((row == row[:, :1] + order).all()):
        return _Lines(row[:, 0].long(), column[:, 0].long(), length, turned=True)
    return None
