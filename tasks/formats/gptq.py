"""AutoGPTQ's layout, for vLLM, GPTQModel and ONNX Runtime GenAI's model builder.

Source: AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py. `qweight` int32 [width * bits / 32, rows], the
inputs in order from a word's lowest bits; `qzeros` int32 [groups, rows * bits / 32], packed along the rows, each zero
point minus one; `scales` float16 [groups, rows]; `g_idx` int32 [width], the group of each input.
A zero point of 0 cannot be stored: some readers take -1 literally, others modulo 16. Grids keep zero points above 0.
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

WORD = 32
MAKERS = ["modelpress:0.1.0", "gptqmodel:0.9.0"]  # constants, so that a model's bytes do not depend on our version
ROWS = 8  # packed together


class Gptq:
    """See the protocol `Format`."""

    native = False
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def scale_dtype(self, model: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
        """See `Format`."""
        return float16_alone("gptq", asked)

    def grid(self, scheme: Scheme, scales: torch.dtype) -> Grid:
        """See `Format`."""
        return Grid(scheme.bits, scheme.group_size, scheme.symmetric, scales, least_zero=1)

    def check(self, layout: Layout) -> None:
        """See `Format`."""
        if layout.skipped:
            raise TaskError(
                "skip_layers is set, but the format gptq does not support unquantized layers; "
                "set format to compressed-tensors or awq"
            )
        check_uniform(layout, "gptq", (4, 8))
        check_groups(layout, "; or set format to compressed-tensors, in which layers may differ")
        check_rows(layout, ROWS, "gptq")

    def pack(self, weight: QuantizedWeight, precision: Precision) -> dict[str, Tensor]:
        """See `Format`. ValueError if a zero point is 0."""
        if not weight.zeros.all():
            raise ValueError("a zero point is 0, which this layout cannot hold; solve on a grid with least_zero=1")
        bits, width = precision.grid.bits, weight.integers.shape[1]
        return {
            "qweight": _pack(weight.integers.T, bits),
            "qzeros": _pack(weight.zeros - 1, bits).T.contiguous(),
            "scales": weight.scales.T.to(torch.float16).contiguous(),
            "g_idx": (torch.arange(width) // weight.group_size).to(torch.int32),
        }

    def describe(self, layout: Layout) -> dict[str, Any]:
        """The quantization_config that AutoGPTQ writes. Groups are stored in their original order, so `desc_act` is
        false in any solving order. GPTQModel accepts this layout's zero points only from its own version that wrote no
        zero point of 0, so `meta` names that version as the maker."""
        grid = layout.only_precision().grid
        return {
            "bits": grid.bits,
            "checkpoint_format": "gptq",
            "damp_percent": layout.damping,
            "desc_act": False,
            "group_size": grid.group_size or -1,
            "lm_head": False,
            "meta": {"quantizer": MAKERS},
            "quant_method": "gptq",
            "static_groups": layout.act_order,
            "sym": grid.symmetric,
            "true_sequential": False,
        }

    def check_config(self, config: Mapping[str, Any], where: str) -> None:
        """See `Format`."""
        if config.get("desc_act"):
            raise TaskError(f"{where} is GPTQ with desc_act=true; only desc_act=false is supported")

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StoredLinear:
        """See `Format`."""
        bits = config["bits"]
        integers = _unpack(tensors["qweight"], bits).T.contiguous()
        zeros = _unpack(tensors["qzeros"].T, bits).contiguous() + 1
        weight = QuantizedWeight(integers, tensors["scales"].T.contiguous(), zeros)
        size = weight.group_size if weight.scales.shape[1] > 1 else None
        return StoredLinear(weight, Precision(Grid(bits, size, bool(config.get("sym")), torch.float16, least_zero=1)))

    def shape(self, sizes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]) -> tuple[int, int]:
        """See `Format`."""
        return sizes["qweight"][1], sizes["g_idx"][0]


def _pack(values: Tensor, bits: int) -> Tensor:
    """uint8 [many, columns] -> int32 [many * bits / 32, columns]."""
    each = WORD // bits
    parts = values.to(torch.int64).reshape(-1, each, values.shape[1])
    word = (parts << (torch.arange(each, device=values.device) * bits)[:, None]).sum(1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 [words, columns] -> uint8 [words * 32 / bits, columns]."""
    shifts = torch.arange(WORD // bits, device=packed.device) * bits
    values: Tensor = (packed[:, None] >> shifts[:, None]) & (2**bits - 1)
    return values.to(torch.uint8).flatten(0, 1)
