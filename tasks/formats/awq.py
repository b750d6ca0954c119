"""AutoAWQ's GEMM layout: 4-bit weights in groups with zero points, output columns interleaved in a word.

Source: AutoAWQ, awq/modules/linear/gemm.py. `qweight` int32 [width, rows / 8], eight 4-bit columns in a word in the
order 0 2 4 6 1 3 5 7; `qzeros` int32 [groups, rows / 8], packed alike; `scales` float16 [groups, rows].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tasks.errors import TaskError
from tasks.formats import Layout, StoredLinear, check_groups, check_rows, check_uniform, float16_alone
from tasks.grid import Grid, Precision, QuantizedWeight

if TYPE_CHECKING:
    from tasks.schemes import Scheme

BITS = 4
ROWS = 32  # packed together
# positions of the columns 0..7 in a word, lowest four bits first
_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


class Awq:
    """See the protocol `Format`."""

    native = False
    parts = ("qweight", "qzeros", "scales")

    def scale_dtype(self, model: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
        """See `Format`."""
        return float16_alone("awq", asked)

    def grid(self, scheme: Scheme, scales: torch.dtype) -> Grid:
        """See `Format`."""
        return Grid(scheme.bits, scheme.group_size, scheme.symmetric, scales)

    def check(self, layout: Layout) -> None:
        """See `Format`."""
        check_uniform(layout, "awq", (BITS,))
        check_groups(layout, "; or set format to compressed-tensors, in which layers may differ")
        check_rows(layout, ROWS, "awq")

    def pack(self, weight: QuantizedWeight, precision: Precision) -> dict[str, Tensor]:
        """See `Format`."""
        return {
            "qweight": pack_columns(weight.integers.T),
            "qzeros": pack_columns(weight.zeros.T),
            "scales": weight.scales.T.to(torch.float16).contiguous(),
        }

    def describe(self, layout: Layout) -> dict[str, Any]:
        """The quantization_config that AutoAWQ writes."""
        grid = layout.only_precision().grid
        # readers match these as name prefixes, patterns or substrings
        skipped = [f"{prefix}{part}" for prefix in layout.skipped for part in ("self_attn", "mlp")]
        return {
            "bits": grid.bits,
            "group_size": grid.group_size,
            "modules_to_not_convert": skipped or None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        }

    def check_config(self, config: Mapping[str, Any], where: str) -> None:
        """See `Format`."""
        found = config.get("bits"), str(config.get("version", "gemm")).lower()
        if found != (BITS, "gemm"):
            raise TaskError(
                f"{where} is AWQ with bits={found[0]}, version={found[1]}; "
                "only 4 bits in GEMM layout are supported; quantize it again"
            )

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StoredLinear:
        """See `Format`."""
        integers, zeros = (unpack_columns(tensors[part]).T.contiguous() for part in ("qweight", "qzeros"))
        weight = QuantizedWeight(integers, tensors["scales"].T.contiguous(), zeros)
        return StoredLinear(weight, Precision(Grid(BITS, weight.group_size, False, torch.float16)))

    def shape(self, sizes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]) -> tuple[int, int]:
        """See `Format`."""
        width, words = sizes["qweight"]
        return words * len(_PLACES), width


def pack_columns(values: Tensor) -> Tensor:
    """uint8 [rows, columns] -> int32 [rows, columns / 8]."""
    columns = values.reshape(len(values), -1, len(_PLACES)).to(torch.int64)
    word = (columns << (_PLACES.to(values.device) * BITS)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def unpack_columns(packed: Tensor) -> Tensor:
    """int32 [rows, columns / 8] -> uint8 [rows, columns], in the original column order."""
    values: Tensor = (packed[:, :, None] >> (_PLACES.to(packed.device) * BITS)) & (2**BITS - 1)
    return values.to(torch.uint8).flatten(1)
