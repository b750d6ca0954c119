"""What the processor is used for."""

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
def test_a_processor_multiplies_what_it_multiplies_fast(
    known: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert fast_dtype("cpu") == dtype


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep less")
def test_what_was_freed_between_other_blocks_is_given_back() -> None:
    blocks = [torch.ones(16_000) for _ in range(4_000)]
    kept = blocks[::2]
    del blocks
    before = psutil.Process().memory_info().rss
    release_memory()
    assert before - psutil.Process().memory_info().rss > 0.9 * 64_000 * len(kept)
