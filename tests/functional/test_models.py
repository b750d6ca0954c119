"""Decoders of every kind go through the pipeline's own code, tiny and random (tools/models.py, docs/models.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.models import CHECKS, PASSED, Row, Trial, page
from tools.tiny_models import TYPES

KINDS = (
    "gemma2",  # norms of 1 + w, post-norms, windows, capped logits
    "phi3",  # fused projections
    "gpt2",  # transposed weights
    "bloom",  # values of several heads in one matrix, positions in the mask
    "qwen3_moe",  # experts that are matrices on disk and a stack in memory
    "gpt_oss",  # transposed stacks with biases
    "granitemoe",  # stacks in modules
    "deepseek_v3",  # latent attention, shared experts, dense first layers
    "qwen3_5_moe",  # linear attention, a gate for the shared expert
    "mamba2",  # no attention
    "gemma4_text",  # keys and values that layers share
    "zamba",  # layers that share weights
    "qwen3_vl",  # a vision tower, and other names on disk
)
REFUSED = {  # by name, and why
    "xlm": "no list of 4 decoder layers was found",
    "reformer": "attn_output",
    "hy_v4": "run layer by layer",
    "xlnet": "a token sees later ones",
}


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in TYPES if kind not in (*KINDS, *REFUSED))]
)
def test_the_kind_is_pressed_as_the_page_says(kind: str, tmp_path: Path) -> None:
    (line,) = (line for line in Path("docs/models.md").read_text().splitlines() if line.startswith(f"| {kind} |"))
    if "not built" in line:
        pytest.skip("Transformers itself does not build it")
    found = Trial(kind, tmp_path / kind).run()
    marks = " | ".join("+" if found.checks.get(name) == PASSED else "-" for name in CHECKS)
    assert line.startswith(f"| {kind} | {marks} |"), found.checks
    assert found.passes or kind not in KINDS, found.checks


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_pressed_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    assert REFUSED[kind] in Trial(kind, tmp_path / kind).run().checks["statistics"]


def test_the_page_counts_what_passed() -> None:
    rows = {
        "llama": Row("llama", "LlamaForCausalLM", dict.fromkeys(CHECKS, PASSED)),
        "xlm": Row("xlm", "XLMWithLMHeadModel", {"streamed": "no list | of layers"}, remarks=["random"]),
    }
    text = page(rows)
    assert text.endswith("1 of 2 types pass.\n")
    assert "| llama | + | + | + | + | + |" in text
    assert "no list / of layers; random" in text
