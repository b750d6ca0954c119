"""A variant: what numbers a weight may take, and how it gets there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tasks.schemes import COARSE, DAMPING, LLAMA_CPP, MIXED, NAMES, NONE, SCHEMES, Scheme, parse_precision
from tasks.settings.section import Section

BUILTIN = "modelpress"  # the backend that is our own
Bits = Annotated[float, Field(gt=2, le=16, strict=False)]
FORMATS = ("compressed-tensors", "awq", "gptq", "gguf")
BACKENDS = (BUILTIN, "llm-compressor", "autoawq", "llama.cpp")
# what a library does, by key: the values that it can be asked for
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
        "scale_dtype": (None,),
        "skip_layers": ([],),
        "output_layer": (None,),
        "embedding": (None,),
        "samples": (None,),
        "format": ("gguf",),
    },
}


class VariantSettings(Section):
    """One way to press the model: what numbers (`scheme`), and how a weight gets there (the other axes).

    scheme: one of compressed-tensors' presets (tasks/schemes.py); none: the model as it came; mixed: a scheme for each
    linear layer, one of `candidates`; or a mixture that llama.cpp's own quantizer makes.
    group_size, symmetric_activations: override the scheme's. scale_dtype: of scales and of all that is not quantized;
    None: the model's own, or what the format asks for.
    scaling: of channels before rounding; smoothing: how much of it, for smoothquant. clip: search for the groups'
    limits. rounding, act_order, damping: GPTQ's order of columns and the share of its matrix' diagonal that is added.
    refine: rounds of least squares on the scales and of coordinate descent on the integers. propagate: solve each layer
    on its inputs as they are once the layers before it are pressed. skip_layers: decoder layers left alone.
    output_layer, embedding: their precisions; None: as they are. Where a model ties the two, output_layer is both's.
    candidates, one of bits_per_weight (scales and zero points counted) and retention (of a token's likelihood, as
    expected from the calibration text), and fused (layers that an engine joins, such as q, k and v, share theirs): of
    the scheme mixed.
    samples: calibration sequences that a library sees; None: all. imatrix: llama.cpp weighs each weight by the mean
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
    def _a_library_has_one_format(cls, values: Any) -> Any:
        """llama.cpp's schemes name their backend, and some backends their format."""
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
    def _each_is_a_precision(cls, value: list[str] | None) -> list[str] | None:
        for one in value or ():
            parse_precision(one)
        if value and (twice := sorted({one for one in value if value.count(one) > 1})):
            raise ValueError(f"names {', '.join(twice)} more than once")
        return value

    @field_validator("output_layer", "embedding")
    @classmethod
    def _is_a_weight_only_precision(cls, value: str | None) -> str | None:
        precision = None if value is None else parse_precision(value)
        if value is not None and (precision is None or not precision.weight_only):
            raise ValueError("is for weights alone: write W8A16@64 or W4A16_ASYM@32, or leave it out")
        return value

    @model_validator(mode="after")
    def _keys_fit_the_scheme(self) -> Self:
        if self.scheme == NONE and (given := sorted(self.model_fields_set - {"scheme"})):
            raise ValueError(f"scheme is none, the model as it came, so {given[0]} says nothing; remove it")
        mixed = self.scheme == MIXED
        for key in ("candidates", "bits_per_weight", "retention", "fused"):
            if not mixed and getattr(self, key) is not None:
                raise ValueError(f"{key} is for the scheme mixed, but scheme is {self.scheme}; remove it")
        if mixed:
            self._check_mixed()
        if self.group_size is not None and (self.scheme not in SCHEMES or not self._preset.weight_only):
            raise ValueError(
                f"group_size is {self.group_size}, but "
                + (
                    "the scheme mixed has one for each candidate, as in W4A16_ASYM@64"
                    if mixed
                    else f"{self.scheme} has no groups of its own"
                )
                + "; remove it"
            )
        if self.symmetric_activations is not None and not self._rounds_activations:
            raise ValueError(f"symmetric_activations is set, but {self.scheme} rounds no activations; remove it")
        if (self.smoothing is None) == self._smooths:
            raise ValueError(
                "smoothing is missing: how much of the difficulty moves to the weights, such as 0.5"
                if self._smooths
                else "smoothing is set, but nothing is smoothed; set scaling to smoothquant or remove it"
            )
        return self

    def _check_mixed(self) -> None:
        if self.candidates is None:
            raise ValueError("candidates are missing: the precisions to choose from, such as [W4A16_ASYM@64, W8A8]")
        if (self.bits_per_weight is None) == (self.retention is None):
            raise ValueError("needs one budget: bits_per_weight, such as 4.5, or retention, such as 0.9")
        if self.fused is None:
            raise ValueError("fused is missing: true where the engine joins q, k and v, as vLLM does, else false")
        if self.format != "compressed-tensors":
            raise ValueError(
                f"format is {self.format}, which knows one scheme for all layers; set format to compressed-tensors"
            )

    @model_validator(mode="after")
    def _backend_can(self) -> Self:
        if self.backend == BUILTIN:
            if self.scheme in LLAMA_CPP:
                raise ValueError(f"scheme is {self.scheme}, which llama.cpp alone makes; set backend to llama.cpp")
            if self.format == "gguf":
                raise ValueError("format is gguf, which is written by the target gguf from any other; remove format")
            if self.imatrix:
                raise ValueError("imatrix is for llama.cpp's schemes; remove it")
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
                    f"{key} is {_word(found)}, which {self.backend} cannot do; set {key} to {can} or backend to "
                    f"{BUILTIN}"
                )
        return self

    @property
    def is_baseline(self) -> bool:
        """Whether the model stays as it came."""
        return bool(self.scheme == NONE)

    @property
    def precision(self) -> Scheme:
        """The scheme of all linear layers, with what overrides it; KeyError for none, mixed and llama.cpp's."""
        return self._overridden(self._preset)

    @property
    def precisions(self) -> dict[str, Scheme | None]:
        """The candidates of the scheme mixed by their names; None: left as it is."""
        found = {text: parse_precision(text) for text in self.candidates or ()}
        return {text: one and self._overridden(one) for text, one in found.items()}

    @property
    def group_sizes(self) -> list[tuple[str, int]]:
        """The settings that say how many weights share a scale, and what they say."""
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
        """Of a weight, as the gate counts them: the fewest that one may get; None for the baseline."""
        if self.scheme in LLAMA_CPP:
            return LLAMA_CPP[self.scheme]
        if self.scheme == MIXED:
            return min((one.bits for one in self.precisions.values() if one), default=None)
        return None if self.is_baseline else self.precision.bits

    @property
    def damping_share(self) -> float:
        """`damping`, or what suits the bits."""
        return DAMPING[(self.bits or COARSE) <= COARSE] if self.damping is None else self.damping

    @property
    def recipe(self) -> str:
        """The axes in words, as in `AWQ scaling, clipping, GPTQ`; nothing for the baseline."""
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
        """Whether SmoothQuant is used: of a mixture, on what rounds activations."""
        return self.scaling == "smoothquant" or (
            self.scheme == MIXED and self.scaling != "none" and self._rounds_activations
        )

    def _overridden(self, scheme: Scheme) -> Scheme:
        if not scheme.weight_only and self.symmetric_activations is not None:
            scheme = replace(scheme, symmetric_activations=self.symmetric_activations)
        return scheme if self.group_size is None else replace(scheme, group_size=self.group_size)


def _word(value: Any) -> str:
    """As it stands in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
