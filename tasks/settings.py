"""params.yaml as typed settings: the one module that both flows/ and tasks/ read.

Every key has a place here, and a key that has none is refused. Defaults live in params.yaml alone; a field has
a default here only where leaving it out means "not used".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tasks.errors import TaskError
from tasks.sources.address import check_data_source, check_model_checksum, check_model_source

NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"
SHA256 = r"^[0-9a-f]{64}$"
BASE = "base"
BUILTIN = "modelpress"  # the backend that is our own
Target = Literal["transformers", "onnx", "gguf"]
TARGETS: tuple[str, ...] = get_args(Target)

Name = Annotated[str, Field(pattern=NAME, max_length=40)]
Sha256 = Annotated[str, Field(pattern=SHA256)]


class Section(BaseModel):
    """A part of params.yaml: immutable, and strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSettings(Section):
    """Where the model comes from."""

    source: str
    sha256: Sha256 | None = None
    dtype: Literal["bfloat16", "float16", "float32"]
    licence: str | None = None

    _readable = field_validator("source")(check_model_source)

    @model_validator(mode="after")
    def _checksum_fits(self) -> ModelSettings:
        check_model_checksum(self.source, self.sha256)
        return self


class DataSource(Section):
    """One set of texts or of evaluation items.

    `field` names the key of a JSONL record that holds the text, or the list of messages if `chat_template` is true.
    `strip` is a regular expression whose matches are cut out of the text; `split` is one that separates documents
    of a text file.
    """

    source: str
    sha256: Sha256 | None = None
    format: Literal["text", "jsonl", "parquet"] = "text"
    field: str | None = None
    split: str | None = None
    strip: str | None = None

    _readable = field_validator("source")(check_data_source)

    @field_validator("split", "strip")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"is not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _field_fits_format(self) -> DataSource:
        if self.format == "text" and self.field is not None:
            raise ValueError("field is for the formats jsonl and parquet; a text file has none")
        return self


class CalibrationSource(DataSource):
    """A source of calibration text; `weight` is its share of the tokens, against the other sources' weights."""

    weight: Annotated[float, Field(gt=0, strict=False)] = 1.0
    chat_template: bool = False

    @model_validator(mode="after")
    def _needs_a_field(self) -> CalibrationSource:
        if self.format != "text" and self.field is None:
            raise ValueError(f"field is missing: name the key of each {self.format} record that holds the text")
        return self


class Overlap(Section):
    """How much of the evaluation data may stand in the calibration data: `ngram` words in a row, `limit` items."""

    ngram: Annotated[int, Field(ge=3, le=100)]
    limit: Annotated[int, Field(ge=0)]


class CalibrationSettings(Section):
    """The text that the quantizers look at."""

    samples: Annotated[int, Field(ge=1, le=65536)]
    sequence_length: Annotated[int, Field(ge=16, le=131072)]
    excerpt: Annotated[int, Field(ge=16)] | None = None
    seed: Annotated[int, Field(ge=0)]
    overlap: Overlap
    sources: Annotated[dict[Name, CalibrationSource], Field(min_length=1)]


class StatisticsSettings(Section):
    """What is found out about the activations. importance: tokens count by how much of what the model says hangs on
    them."""

    importance: bool


class TextSource(DataSource):
    """A held-out text for perplexity and divergence."""


class EvaluationSettings(Section):
    """How the baseline and every variant are measured: one contract for all."""

    tasks: Annotated[list[str], Field(min_length=1)]
    limit: Annotated[int, Field(ge=1)] | None
    shots: Annotated[int, Field(ge=0, le=64)] | None
    chat_template: bool
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_tokens: Annotated[int, Field(ge=16)]
    seed: Annotated[int, Field(ge=0)]
    sources: dict[Name, DataSource]
    texts: Annotated[dict[Name, TextSource], Field(min_length=1)]
    text_tokens: Annotated[int, Field(ge=64)]
    window: Annotated[int, Field(ge=16)]

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        twice = sorted({t for t in value if value.count(t) > 1})
        if twice:
            raise ValueError(f"names {', '.join(twice)} more than once; name each task once")
        return value


class NoneSettings(Section):
    """The baseline: the model as it came, in `model.dtype`."""

    method: Literal["none"]


class _Calibrated(Section):
    """What the methods share. backend: our own solvers on the model's statistics, or a library. samples: how many of
    the calibration sequences a library sees (None: all); the statistics are of all of them."""

    backend: str
    samples: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _statistics_are_of_all_samples(self) -> Self:
        if self.backend == BUILTIN and self.samples is not None:
            raise ValueError(
                f"samples is {self.samples}, but the backend {BUILTIN} uses the statistics of all sequences; "
                "remove samples, or set calibration.samples"
            )
        return self

    def _only(self, **values: Any) -> None:
        """ValueError where a library is asked for what only our own solvers do. values: what it does."""
        for key, value in values.items():
            if self.backend != BUILTIN and getattr(self, key) != value:
                found, expected = (str(v).lower() for v in (getattr(self, key), value))
                raise ValueError(
                    f"{key} is {found}, which {self.backend} cannot do; set {key} to {expected} or backend to {BUILTIN}"
                )


# rounds of least squares on the scales and of coordinate descent on the integers, after the rounding
Refine = Annotated[int, Field(ge=0, le=20)]
Format = Literal["compressed-tensors", "awq", "gptq"]


class Int8Settings(_Calibrated):
    """W8A8: 8-bit weights per output channel, 8-bit activations per token, after SmoothQuant (arXiv 2211.10438)."""

    method: Literal["int8"]
    backend: Literal["modelpress", "llm-compressor"]
    skip_layers: list[Annotated[int, Field(ge=0)]] = []
    smoothing: Annotated[float, Field(ge=0, le=1, strict=False)]
    rounding: Literal["nearest", "gptq"]
    symmetric_activations: bool

    @model_validator(mode="after")
    def _a_library_does_it_its_own_way(self) -> Self:
        self._only(rounding="nearest")
        return self

    @property
    def bits(self) -> int:
        """Bits of a quantized weight."""
        return 8


class GptqSettings(_Calibrated):
    """GPTQ (arXiv 2210.17323), 4-bit weights in groups along the input."""

    method: Literal["gptq"]
    backend: Literal["modelpress", "llm-compressor"]
    skip_layers: list[Annotated[int, Field(ge=0)]] = []
    bits: Literal[4]
    group_size: Annotated[int, Field(ge=8, le=1024)]
    symmetric: bool
    act_order: Literal["static", "none"]
    damping: Annotated[float, Field(gt=0, lt=1)]
    clip: bool
    refine: Refine
    propagate: bool
    format: Format

    @model_validator(mode="after")
    def _a_library_does_it_its_own_way(self) -> Self:
        self._only(clip=False, refine=0, propagate=False, format="compressed-tensors")
        return self


class AwqSettings(_Calibrated):
    """AWQ (arXiv 2306.00978), 4-bit weights in groups along the input."""

    method: Literal["awq"]
    backend: Literal["modelpress", "autoawq"]
    bits: Literal[4]
    group_size: Annotated[int, Field(ge=8, le=1024)]
    clip: bool
    rounding: Literal["nearest", "gptq"]
    refine: Refine
    propagate: bool
    format: Format

    @model_validator(mode="after")
    def _a_library_does_it_its_own_way(self) -> Self:
        self._only(rounding="nearest", refine=0, propagate=False, format="awq")
        return self


class AutoSettings(_Calibrated):
    """Mixed precision: bits and groups of each linear layer, chosen for the least error in a given size.

    The budget is one of two. bits_per_weight: over all linear layers of the decoder, scales and zero points counted;
    retention: of a token's likelihood, exp(-divergence), as it is expected from the calibration text. candidates:
    BITS@GROUP_SIZE. fused: layers that an engine makes one of, such as q, k and v, share theirs.
    """

    method: Literal["auto"]
    backend: Literal["modelpress"]
    bits_per_weight: Annotated[float, Field(gt=2, le=16, strict=False)] | None = None
    retention: Annotated[float, Field(gt=0, lt=1)] | None = None
    candidates: Annotated[list[Annotated[str, Field(pattern=r"^[48]@[0-9]+$")]], Field(min_length=2)]
    fused: bool
    refine: Refine
    propagate: bool

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.bits_per_weight is None) == (self.retention is None):
            raise ValueError("needs one budget: bits_per_weight, such as 4.5, or retention, such as 0.9")
        return self

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(bits, group size) of each candidate."""
        found = (one.partition("@") for one in self.candidates)
        return [(int(bits), int(size)) for bits, _, size in found]

    @property
    def bits(self) -> int:
        """Of a weight, as the gate counts them: the fewest that one may get."""
        return min(bits for bits, _ in self.pairs)


class GgufSettings(Section):
    """llama.cpp's own quantizer, for the target gguf alone. type: its name for the mixture of types that it chooses for
    the layers. importance: weigh each weight by its inputs' mean square, from our statistics."""

    method: Literal["gguf"]
    type: Literal["Q4_K_M", "Q5_K_M", "Q6_K"]
    importance: bool

    @property
    def backend(self) -> str:
        """Who presses."""
        return "llama.cpp"

    @property
    def bits(self) -> int:
        """Bits of most weights."""
        return int(self.type[1])


Variant = Annotated[
    NoneSettings | Int8Settings | GptqSettings | AwqSettings | AutoSettings | GgufSettings,
    Field(discriminator="method"),
]


class OnnxSettings(Section):
    """What the target `onnx` asks. output_layer: bits of the output layer and the embedding of a pressed model, which
    the methods leave alone; 32: as they are. Those of the baseline stay as they are."""

    output_layer: Literal[32, 8, 4]


class GgufTarget(Section):
    """What the target `gguf` asks; see `OnnxSettings`."""

    output_layer: Literal[32, 8]


class BenchmarkSettings(Section):
    """The work that speed is measured on."""

    dtype: Literal["float32", "bfloat16", "float16"]
    prompt_tokens: Annotated[int, Field(ge=1)]
    new_tokens: Annotated[int, Field(ge=2)]
    batch_size: Annotated[int, Field(ge=1)]
    repeats: Annotated[int, Field(ge=1)]


class GateSettings(Section):
    """When a variant passes: the least retention, by the bits of its weights, and how sure we must be."""

    four_bit: Annotated[float, Field(gt=0, le=1.5, strict=False)]
    eight_bit: Annotated[float, Field(gt=0, le=1.5, strict=False)]
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    resamples: Annotated[int, Field(ge=100, le=1_000_000)]


class PackageSettings(Section):
    """What is shipped, and under which name."""

    name: Name


class Settings(Section):
    """All of params.yaml."""

    model: ModelSettings
    calibration: CalibrationSettings
    statistics: StatisticsSettings
    variants: dict[Name, Variant]
    target: Target
    onnx: OnnxSettings
    gguf: GgufTarget
    evaluation: EvaluationSettings
    benchmark: BenchmarkSettings
    gate: GateSettings
    package: PackageSettings

    @field_validator("variants")
    @classmethod
    def _baseline_and_distinct_variants(cls, value: dict[str, Variant]) -> dict[str, Variant]:
        if not isinstance(value.get(BASE), NoneSettings):
            raise ValueError(f"must hold the baseline: add `{BASE}: {{method: none}}`")
        if len(value) < 2:
            raise ValueError(
                "holds nothing to compare with the baseline; add a variant, such as "
                "`int8: {method: int8, backend: modelpress, smoothing: 0.5, rounding: gptq, "
                "symmetric_activations: false}`"
            )
        seen: dict[str, str] = {}
        for name, variant in value.items():
            key = variant.model_dump_json()
            if key in seen:
                raise ValueError(
                    f"{seen[key]} and {name} have the same settings, so they would be one model twice; "
                    "change a setting of one or remove it"
                )
            seen[key] = name
        return value

    @model_validator(mode="after")
    def _each_data_set_has_its_own_name(self) -> Settings:
        groups: dict[str, Mapping[str, DataSource]] = {
            "calibration.sources": self.calibration.sources,
            "evaluation.sources": self.evaluation.sources,
            "evaluation.texts": self.evaluation.texts,
        }
        owner: dict[str, str] = {}
        for group, names in groups.items():
            for name in names:
                if name in owner:
                    raise ValueError(
                        f"{owner[name]}.{name} and {group}.{name} have one name, but each data set is kept in "
                        f"data/raw/{name}; rename one"
                    )
                owner[name] = group
        return self

    @model_validator(mode="after")
    def _samples_exist(self) -> Settings:
        for name, variant in self.variants.items():
            wanted = getattr(variant, "samples", None)
            if wanted is not None and wanted > self.calibration.samples:
                raise ValueError(
                    f"variants.{name}.samples is {wanted}, but calibration.samples is only "
                    f"{self.calibration.samples}; lower the one or raise the other"
                )
        return self

    @model_validator(mode="after")
    def _method_fits_target(self) -> Settings:
        for name, variant in self.variants.items():
            if isinstance(variant, GgufSettings) and self.target != "gguf":
                raise ValueError(
                    f"variants.{name}.method is gguf, which only the target gguf can run, but target is {self.target}; "
                    "set target to gguf, or remove the variant"
                )
        return self

    @model_validator(mode="after")
    def _graph_decides_the_arithmetic(self) -> Settings:
        for section, dtype in (("evaluation", self.evaluation.dtype), ("benchmark", self.benchmark.dtype)):
            if self.target == "onnx" and dtype != "float32":
                raise ValueError(
                    f"{section}.dtype is {dtype}, but for the target onnx the exported graph decides: float32, and "
                    f"integers of 8 bits where weights are integers; set {section}.dtype to float32"
                )
        return self

    def variant(self, name: str) -> Variant:
        """The settings of the variant `name`; TaskError if there is none."""
        if name not in self.variants:
            raise TaskError(f"no variant {name!r} in params.yaml; there are: {', '.join(self.variants)}")
        return self.variants[name]


def load_settings(path: Path) -> Settings:
    """Read and check params.yaml; TaskError naming each field, its value and what is expected there."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TaskError(f"{path} not found in {Path.cwd()}; run in the project's folder") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text: {error}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TaskError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return check_settings(values, str(path))


def check_settings(values: Any, origin: str = "params.yaml") -> Settings:
    """Turn plain values into Settings; TaskError naming each field, its value and what is expected there."""
    if not isinstance(values, Mapping):
        raise TaskError(f"{origin} holds {type(values).__name__}, expected a mapping of sections")
    try:
        return Settings.model_validate(dict(values))
    except ValidationError as error:
        raise TaskError(f"{origin}: " + "; ".join(_explain(e) for e in error.errors())) from error


_METHODS = ("none", "int8", "gptq", "awq", "auto", "gguf")


def _explain(error: Any) -> str:
    """One finding of pydantic, in a person's words."""
    parts = [str(p) for p in error["loc"]]
    # the discriminator of a union stands in the location, but not in the file
    if len(parts) > 2 and parts[0] == "variants" and parts[2] in _METHODS:
        del parts[2]
    where = ".".join(p for p in parts if p != "[key]")
    match error["type"]:
        case "extra_forbidden":
            return f"{where} is no setting (found {_short(error['input'])}); remove it or mend the spelling"
        case "missing":
            return f"{where} is missing"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"{where}.method must be one of {', '.join(_METHODS)} (found {_short(error['input'])})"
        case "value_error":
            # where the finding is about a whole section, its value would only repeat the file
            return f"{where + ': ' if where else ''}{error['ctx']['error']}"
        case _:
            return f"{where} is {_short(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
