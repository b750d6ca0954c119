"""Which engines load a variant's files, for the model card and the bundle's folder serve/."""

from __future__ import annotations

from tasks.settings import VariantSettings


def why_not_vllm(name: str, variant: VariantSettings) -> str:
    """Why vLLM does not load the variant, with the setting to change, as sentences; empty if it does."""
    if variant.fused is False:
        return (
            "vLLM does not load this model, because it fuses q, k and v into one layer, and gate and up into another. "
            "In this model, their precisions can differ. "
            f"To use vLLM, quantize again with `variants.{name}.fused: true`."
        )
    if variant.format == "gptq" and variant.scheme == "W4A16_ASYM":
        return (
            "vLLM does not load this model, because it reads AutoGPTQ's layout only with symmetric groups. "
            f"To use vLLM, quantize again with `variants.{name}.format: compressed-tensors`."
        )
    return ""
