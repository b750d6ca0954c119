"""Fast dtypes by processor, and release of freed memory."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch

from tasks.device import fast_dtype
from tasks.hardware import release_memory


@pytest.mark.parametrize(
    ("known", "dtype"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
    ],
)
def test_fast_dtype_by_cpu_capabilities(
    known: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert fast_dtype("cpu") == dtype


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep less")
def test_freed_memory_between_blocks_in_use_is_returned() -> None:
    blocks = [torch.ones(16_000) for _ in range(4_000)]
    kept = blocks[::2]
    del blocks
    before = psutil.Process().memory_info().rss
    release_memory()
    assert before - psutil.Process().memory_info().rss > 0.9 * 64_000 * len(kept)
