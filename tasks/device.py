"""The device and the dtype of this machine's computations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def compute_device() -> str:
    """Return "cuda" if torch finds a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_dtype(device: str) -> torch.dtype:
    """The faster dtype for matrix products on `device`: bfloat16 or float32.

    On x86, bfloat16 is faster only with AMX; with avx512_bf16 alone it reached 0.6 of float32's speed.
    """
    import torch

    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = torch.cpu.get_capabilities()
        native = any(known.get(name) for name in ("amx_bf16", "bf16"))  # bf16: ARM
    return torch.bfloat16 if native else torch.float32
