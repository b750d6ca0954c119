"""Quantization schemes of weights and activations, by compressed-tensors' preset names.

The values equal compressed_tensors.quantization.PRESET_SCHEMES (a test checks this), without an import of torch.
A precision such as `W4A16_ASYM@64` is a scheme with its own group size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NONE, MIXED = "none", "mixed"  # the unquantized model; one scheme per linear layer


@dataclass(frozen=True)
class Scheme:
    """Integer weights, and optionally integer activations, quantized per token.

    bits: per weight. group_size: weights of a row that share a scale; None: the whole row. symmetric: the zero point is
    the middle of the integers. activation_bits: None: activations are not quantized.
    """

    name: str
    bits: int
    group_size: int | None
    symmetric: bool
    activation_bits: int | None = None
    symmetric_activations: bool | None = None

    @property
    def weight_only(self) -> bool:
        """Whether activations are left unquantized."""
        return self.activation_bits is None


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("W4A16", bits=4, group_size=128, symmetric=True),
        Scheme("W4A16_ASYM", bits=4, group_size=128, symmetric=False),
        Scheme("W8A16", bits=8, group_size=128, symmetric=True),
        Scheme("W8A8", bits=8, group_size=None, symmetric=True, activation_bits=8, symmetric_activations=True),
    )
}
# mixtures of types that llama.cpp's quantizer assigns to layers, with the bits of most weights
LLAMA_CPP = {"Q4_K_M": 4, "Q5_K_M": 5, "Q6_K": 6}
NAMES = (NONE, *SCHEMES, MIXED, *LLAMA_CPP)


def overridden(scheme: Scheme, group_size: int | None, symmetric_activations: bool | None) -> Scheme:
    """The scheme with a variant's overrides; None: not overridden."""
    if group_size is not None:
        scheme = replace(scheme, group_size=group_size)
    if symmetric_activations is not None and not scheme.weight_only:
        scheme = replace(scheme, symmetric_activations=symmetric_activations)
    return scheme


def default_damping(bits: int) -> float:
    """The share of the Gram matrix's mean diagonal that is added to its diagonal before rounding to `bits`.

    Measured on the demo's model: with 8-bit weights, errors are so small that stronger damping, which relies less on
    correlations in the calibration text, costs nothing.
    """
    return 0.05 if bits <= 4 else 0.3


def parse_precision(text: str) -> Scheme | None:
    """Parse `W4A16_ASYM@64`, `W8A8` or `none` (None); ValueError naming the known schemes otherwise."""
    name, at, size = text.partition("@")
    if name == NONE and not at:
        return None
    if name not in SCHEMES or (at and not size.isdecimal()):
        raise ValueError(
            f"{text!r} is no precision; write a scheme ({', '.join(SCHEMES)}), optionally with a group size as in "
            f"W4A16_ASYM@64, or {NONE}"
        )
    scheme = SCHEMES[name]
    return replace(scheme, group_size=int(size)) if at else scheme


def precision_label(scheme: Scheme | None) -> str:
    """The text form that `parse_precision` reads."""
    if scheme is None:
        return NONE
    return scheme.name if scheme.group_size is None else f"{scheme.name}@{scheme.group_size}"
