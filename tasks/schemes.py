"""What numbers a weight and an activation may take: compressed-tensors' preset schemes, by their names.

The values are those of compressed_tensors.quantization.PRESET_SCHEMES (a test holds them equal); here they cost no
import of torch. A precision such as `W4A16_ASYM@64` is a scheme with a group size of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NONE, MIXED = "none", "mixed"  # no scheme: as the model came; a scheme for each linear layer


@dataclass(frozen=True)
class Scheme:
    """Integers for weights, and for activations where they are rounded as well, token by token.

    bits: of a weight. group_size: weights of a row that share a scale; None: the whole row. symmetric: zero lies in the
    middle of the integers. activation_bits: None: activations are not rounded.
    """

    name: str
    bits: int
    group_size: int | None
    symmetric: bool
    activation_bits: int | None = None
    symmetric_activations: bool | None = None

    @property
    def weight_only(self) -> bool:
        """Whether activations stay as they are."""
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
# mixtures of types that llama.cpp's own quantizer chooses for the layers, and the bits of most weights
LLAMA_CPP = {"Q4_K_M": 4, "Q5_K_M": 5, "Q6_K": 6}
COARSE = 4  # bits; with as few, little is made of the calibration text's correlations, with more still less
DAMPING = {True: 0.05, False: 0.3}  # of the Gram matrix, by whether weights are that coarse
NAMES = (NONE, *SCHEMES, MIXED, *LLAMA_CPP)


def parse_precision(text: str) -> Scheme | None:
    """`W4A16_ASYM@64`, `W8A8`, or `none` (None): ValueError naming what is known if it is neither."""
    name, at, size = text.partition("@")
    if name == NONE and not at:
        return None
    if name not in SCHEMES or (at and not size.isdecimal()):
        raise ValueError(
            f"{text!r} is no precision; write a scheme ({', '.join(SCHEMES)}), with a group size of its own as "
            f"W4A16_ASYM@64, or {NONE}"
        )
    scheme = SCHEMES[name]
    return replace(scheme, group_size=int(size)) if at else scheme


def precision_label(scheme: Scheme | None) -> str:
    """As `parse_precision` reads it."""
    if scheme is None:
        return NONE
    return scheme.name if scheme.group_size is None else f"{scheme.name}@{scheme.group_size}"
