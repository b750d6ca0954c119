"""The settings of a variant: its scheme, and the methods that quantize to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tasks.schemes import (
    LLAMA_CPP,
    MIXED,
    NAMES,
    NONE,
    SCHEMES,
    Scheme,
    default_damping,
    overridden,
    parse_precision,
)
from tasks.settings.section import Section

BUILTIN = "modelpress"  # our own backend
Bits = Annotated[float, Field(gt=2, le=16, strict=False)]
FORMATS = ("compressed-tensors", "awq", "gptq", "gguf")
BACKENDS = (BUILTIN, "llm-compressor", "autoawq", "llama.cpp")
# the values of each setting that a library supports
ABILITIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "llm-compressor": {
        "scheme": ("W8A8", "W8A16", "W4A16", "W4A16_ASYM"),
        "scaling": ("none", "smoothquant"),
        "clip": (False,),
        "refine": (0,),
        "propagate": (False,),
        "scale_dtype": (None,),
        "output_layer": (None,),
        "embedding": (None,),
        "format": ("compressed-tensors",),
        "imatrix": (False,),
    },
    "autoawq": {
        "scheme": ("W4A16_ASYM",),
        "scaling": ("awq",),
        "rounding": ("nearest",),
        "act_order": ("static",),
        "damping": (None,),
        "refine": (0,),
        "propagate": (False,),
        "scale_dtype": (None, "float16"),
        "skip_layers": ([],),
        "output_layer": (None,),
        "embedding": (None,),
        "format": ("awq",),
        "imatrix": (False,),
    },
    "llama.cpp": {
        "scheme": tuple(LLAMA_CPP),
        "scaling": ("none",),
        "clip": (False,),
        "rounding": ("nearest",),
        "act_order": ("static",),
        "damping": (None,),
        "refine": (0,),
        "propagate": (False,),
        "grouped_values": (False,),
        "scale_dtype": (None,),
        "skip_layers": ([],),
        "output_layer": (None,),
        "embedding": (None,),
        "samples": (None,),
        "format": ("gguf",),
    },
}


class VariantSettings(Section):
    """One way to quantize the model: a scheme, and the methods (the other axes).

    scheme: a preset of compressed-tensors (tasks/schemes.py); none: unquantized; mixed: one of `candidates` for each
    linear layer; or a mixture of llama.cpp's quantizer.
    group_size, symmetric_activations: override the scheme. scale_dtype: dtype of scales and unquantized tensors; None:
    the model's, or the one that the format requires.
    scaling: of channels before rounding; smoothing: its strength, for smoothquant; grouped_values: also of values that
    several query heads share. clip: search each group's clipping
    range. rounding, act_order, damping: GPTQ's column order and the damping of its Hessian.
    refine: rounds of least squares on the scales and coordinate descent on the integers. propagate: solve each layer on
    the activations of the quantized layers before it. skip_layers: decoder layers left unquantized.
    output_layer, embedding: their precisions; None: unquantized. If the model ties them, output_layer applies to both.
    Only for the scheme mixed: candidates; one budget, bits_per_weight (including scales and zero points) or retention
    (expected, of a token's likelihood on the calibration text); fused: layers that an engine fuses, such as q, k and v,
    share one precision.
    samples: calibration sequences that a library uses; None: all. imatrix: llama.cpp weights each error by the mean
    square of its input.
    """

    scheme: Literal[NAMES]  # type: ignore[valid-type]
    group_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    symmetric_activations: bool | None = None
    scale_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    candidates: Annotated[list[str], Field(min_length=2)] | None = None
    bits_per_weight: Bits | None = None
    retention: Annotated[float, Field(gt=0, lt=1)] | None = None
    fused: bool | None = None
    scaling: Literal["none", "awq", "smoothquant"] = "none"
    smoothing: Annotated[float, Field(ge=0, le=1, strict=False)] | None = None
    grouped_values: bool = False
    clip: bool = False
    rounding: Literal["nearest", "gptq"] = "nearest"
    act_order: Literal["static", "none"] = "static"
    damping: Annotated[float, Field(gt=0, lt=1)] | None = None
    refine: Annotated[int, Field(ge=0, le=20)] = 0
    propagate: bool = False
    skip_layers: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    output_layer: str | None = None
    embedding: str | None = None
    format: Literal[FORMATS] = "compressed-tensors"  # type: ignore[valid-type]
    backend: Literal[BACKENDS] = BUILTIN  # type: ignore[valid-type]
    samples: Annotated[int, Field(ge=1)] | None = None
    imatrix: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_in_backend_and_format(cls, values: Any) -> Any:
        """Fill in the backend of llama.cpp's schemes, and the format of backends that have only one."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        if filled.get("scheme") in LLAMA_CPP:
            filled.setdefault("backend", "llama.cpp")
        formats = ABILITIES.get(str(filled.get("backend")), {}).get("format", ())
        if len(formats) == 1:
            filled.setdefault("format", formats[0])
        return filled

    @field_validator("candidates")
    @classmethod
    def _check_candidates(cls, value: list[str] | None) -> list[str] | None:
        for one in value or ():
            parse_precision(one)
        if value and (twice := sorted({one for one in value if value.count(one) > 1})):
            raise ValueError(f"names {', '.join(twice)} more than once")
        return value

    @field_validator("output_layer", "embedding")
    @classmethod
    def _check_weight_only(cls, value: str | None) -> str | None:
        precision = None if value is None else parse_precision(value)
        if value is not None and (precision is None or not precision.weight_only):
            raise ValueError("must be weight-only: write W8A16@64 or W4A16_ASYM@32, or leave it out")
        return value

    @model_validator(mode="after")
    def _check_scheme(self) -> Self:
        if self.scheme == NONE and (given := sorted(self.model_fields_set - {"scheme"})):
            raise ValueError(f"scheme is none (unquantized), so {given[0]} has no effect; remove it")
        mixed = self.scheme == MIXED
        for key in ("candidates", "bits_per_weight", "retention", "fused"):
            if not mixed and getattr(self, key) is not None:
                raise ValueError(f"{key} applies only to the scheme mixed, but scheme is {self.scheme}; remove it")
        if mixed:
            self._check_mixed()
        if self.group_size is not None and (self.scheme not in SCHEMES or not self._preset.weight_only):
            raise ValueError(
                f"group_size is {self.group_size}, but "
                + (
                    "each candidate of the scheme mixed has its own, as in W4A16_ASYM@64"
                    if mixed
                    else f"{self.scheme} takes no group size"
                )
                + "; remove it"
            )
        if self.symmetric_activations is not None and not self._rounds_activations:
            raise ValueError(
                f"symmetric_activations is set, but {self.scheme} does not quantize activations; remove it"
            )
        if (self.smoothing is None) == self._smooths:
            raise ValueError(
                "smoothing is missing: the share of the difficulty that moves to the weights, such as 0.5"
                if self._smooths
                else "smoothing is set, but scaling is not smoothquant; set scaling to smoothquant or remove it"
            )
        return self

    def _check_mixed(self) -> None:
        if self.candidates is None:
            raise ValueError("candidates are missing: the precisions to choose from, such as [W4A16_ASYM@64, W8A8]")
        if (self.bits_per_weight is None) == (self.retention is None):
            raise ValueError("needs one budget: bits_per_weight, such as 4.5, or retention, such as 0.9")
        if self.fused is None:
            raise ValueError("fused is missing: true if the engine fuses q, k and v, as vLLM does, else false")
        if self.format != "compressed-tensors":
            raise ValueError(
                f"format is {self.format}, which holds one scheme for all layers; set format to compressed-tensors"
            )

    @model_validator(mode="after")
    def _check_backend(self) -> Self:
        if self.backend == BUILTIN:
            if self.scheme in LLAMA_CPP:
                raise ValueError(f"scheme is {self.scheme}, which only llama.cpp supports; set backend to llama.cpp")
            if self.format == "gguf":
                raise ValueError("format is gguf, but the target gguf converts from any other format; remove format")
            if self.imatrix:
                raise ValueError("imatrix applies only to llama.cpp's schemes; remove it")
            if self.samples is not None:
                raise ValueError(
                    f"samples is {self.samples}, but the backend {BUILTIN} uses the statistics of all sequences; "
                    "remove samples, or set calibration.samples"
                )
            return self
        for key, values in ABILITIES[self.backend].items():
            if (found := getattr(self, key)) not in values:
                can = " or ".join(_word(value) for value in values)
                raise ValueError(
                    f"{key} is {_word(found)}, which {self.backend} does not support; set {key} to {can} or backend to "
                    f"{BUILTIN}"
                )
        return self

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unquantized model."""
        return bool(self.scheme == NONE)

    @property
    def is_ours(self) -> bool:
        """Whether our own quantizer makes it."""
        return not self.is_baseline and self.backend == BUILTIN

    @property
    def has_shares(self) -> bool:
        """Whether several processes can quantize its layers, also on several machines (tasks/quantizers/assist.py)."""
        return self.is_ours and not self.propagate

    @property
    def precision(self) -> Scheme:
        """The scheme of all linear layers with overrides; KeyError for none, mixed and llama.cpp's schemes."""
        return self._overridden(self._preset)

    @property
    def precisions(self) -> dict[str, Scheme | None]:
        """The candidates of the scheme mixed by name; None: unquantized."""
        found = {text: parse_precision(text) for text in self.candidates or ()}
        return {text: one and self._overridden(one) for text, one in found.items()}

    @property
    def group_sizes(self) -> list[tuple[str, int]]:
        """The names and values of the settings that contain a group size."""
        keys = {
            "candidates": self.candidates or (),
            "output_layer": (self.output_layer,),
            "embedding": (self.embedding,),
        }
        found = [(key, parse_precision(text)) for key, texts in keys.items() for text in texts if text]
        if self.scheme in SCHEMES:
            found.append(("group_size", self.precision))
        return [(key, one.group_size) for key, one in found if one and one.group_size]

    @property
    def bits(self) -> int | None:
        """The bits per weight for the gate: the smallest that any layer may get; None for the baseline."""
        if self.scheme in LLAMA_CPP:
            return LLAMA_CPP[self.scheme]
        if self.scheme == MIXED:
            return min((one.bits for one in self.precisions.values() if one), default=None)
        return None if self.is_baseline else self.precision.bits

    @property
    def damping_share(self) -> float:
        """`damping`, or the default for the bits."""
        return default_damping(self.bits or 16) if self.damping is None else self.damping

    @property
    def recipe(self) -> str:
        """The methods in words, such as `AWQ scaling, clipping, GPTQ`; empty for the baseline."""
        words = {
            {"awq": "AWQ scaling", "smoothquant": "SmoothQuant", "none": ""}[self.scaling]: True,
            "clipping": self.clip,
            "GPTQ" if self.rounding == "gptq" else "rounding to nearest": self.backend != "llama.cpp",
            "refinement": self.refine,
            "propagated errors": self.propagate,
            "importance matrix": self.imatrix,
        }
        return "" if self.is_baseline else ", ".join(word for word, used in words.items() if word and used)

    @property
    def _preset(self) -> Scheme:
        return SCHEMES[self.scheme]

    @property
    def _rounds_activations(self) -> bool:
        if self.scheme == MIXED:
            return any(one and not one.weight_only for one in map(parse_precision, self.candidates or ()))
        return self.scheme in SCHEMES and not self._preset.weight_only

    @property
    def _smooths(self) -> bool:
        """Whether SmoothQuant applies; in a mixture, to layers with quantized activations."""
        return self.scaling == "smoothquant" or (
            self.scheme == MIXED and self.scaling != "none" and self._rounds_activations
        )

    def _overridden(self, scheme: Scheme) -> Scheme:
        return overridden(scheme, self.group_size, self.symmetric_activations)


def _word(value: Any) -> str:
    """Format a value as in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
