"""What this machine computes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def compute_device() -> str:
    """ "cuda" if torch finds a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_dtype(device: str) -> torch.dtype:
    """Of matrix products: bfloat16 where that is the faster one, float32 elsewhere.

    Of x86 processors it is with AMX; avx512_bf16 by itself was measured at 0.6 of float32's speed.
    """
    import torch

    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = torch.cpu.get_capabilities()
        native = any(known.get(name) for name in ("amx_bf16", "bf16"))  # the last: of ARM
    return torch.bfloat16 if native else torch.float32
