"""params.yaml as typed settings, shared by flows/ and tasks/.

Unknown keys are refused. Defaults live in params.yaml; a field has a default here only where leaving it out means
"not used".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from tasks.errors import TaskError
from tasks.old_words import new_words
from tasks.settings.data import CalibrationSettings, CalibrationSource, DataSource, ModelSettings, Overlap, TextSource
from tasks.settings.measuring import (
    BenchmarkSettings,
    EvaluationSettings,
    GateSettings,
    HardwareSettings,
    LoadSettings,
    ObjectiveSettings,
    PackageSettings,
    ServeSettings,
    StatisticsSettings,
)
from tasks.settings.section import CHAT_DATE, Name, Section
from tasks.settings.variant import ABILITIES, BACKENDS, BUILTIN, FORMATS, VariantSettings

__all__ = [
    "ABILITIES",
    "BACKENDS",
    "BASE",
    "BUILTIN",
    "CHAT_DATE",
    "FORMATS",
    "TARGETS",
    "BenchmarkSettings",
    "CalibrationSettings",
    "CalibrationSource",
    "DataSource",
    "EvaluationSettings",
    "GateSettings",
    "HardwareSettings",
    "LoadSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "Overlap",
    "ServeSettings",
    "Settings",
    "Target",
    "TextSource",
    "VariantSettings",
    "check_settings",
    "load_settings",
]

BASE = "base"
Target = Literal["transformers", "vllm", "onnx", "gguf"]
TARGETS: tuple[str, ...] = get_args(Target)


class Settings(Section):
    """All of params.yaml."""

    model: ModelSettings
    calibration: CalibrationSettings
    statistics: StatisticsSettings
    variants: dict[Name, VariantSettings]
    targets: Annotated[list[Target], Field(min_length=1)]
    evaluation: EvaluationSettings
    benchmark: BenchmarkSettings
    serve: ServeSettings
    load: LoadSettings
    gate: GateSettings
    package: PackageSettings

    @field_validator("variants")
    @classmethod
    def _check_variants(cls, value: dict[str, VariantSettings]) -> dict[str, VariantSettings]:
        if BASE not in value or not value[BASE].is_baseline:
            raise ValueError(f"must hold the baseline: add `{BASE}: {{scheme: none}}`")
        if len(value) < 2:
            raise ValueError(
                "holds nothing to compare with the baseline; add a variant, such as "
                "`int8: {scheme: W8A8, scaling: smoothquant, smoothing: 0.5, rounding: gptq}`"
            )
        seen: dict[str, str] = {}
        for name, variant in value.items():
            key = variant.model_dump_json()
            if key in seen:
                raise ValueError(
                    f"{seen[key]} and {name} have the same settings, so they would produce the same model; "
                    "change a setting of one or remove it"
                )
            seen[key] = name
        return value

    @model_validator(mode="after")
    def _check_data_set_names(self) -> Settings:
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
                        f"{owner[name]}.{name} and {group}.{name} have the same name, but each data set is stored in "
                        f"data/raw/{name}; rename one"
                    )
                owner[name] = group
        return self

    @model_validator(mode="after")
    def _check_samples(self) -> Settings:
        for name, variant in self.variants.items():
            wanted = variant.samples
            if wanted is not None and wanted > self.calibration.samples:
                raise ValueError(
                    f"variants.{name}.samples is {wanted}, but calibration.samples is only "
                    f"{self.calibration.samples}; lower the former or raise the latter"
                )
        return self

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, value: list[Target]) -> list[Target]:
        if twice := sorted({target for target in value if value.count(target) > 1}):
            raise ValueError(f"names {', '.join(twice)} twice; name each target once")
        return value

    @model_validator(mode="after")
    def _check_llama_cpp(self) -> Settings:
        others = [target for target in self.targets if target != "gguf"]
        for name, variant in self.variants.items():
            if variant.format == "gguf" and others:
                raise ValueError(
                    f"variants.{name}.scheme is {variant.scheme}, which only the target gguf runs, but targets has "
                    f"{', '.join(others)}; set targets to [gguf], or remove the variant"
                )
        return self

    @model_validator(mode="after")
    def _check_onnx_dtype(self) -> Settings:
        for section, dtype in (("evaluation", self.evaluation.dtype), ("benchmark", self.benchmark.dtype)):
            if "onnx" in self.targets and dtype != "float32":
                raise ValueError(
                    f"{section}.dtype is {dtype}, but for the target onnx the exported graph computes in float32, "
                    f"and in 8-bit integers where weights are integers; set {section}.dtype to float32"
                )
        return self

    def variant(self, name: str) -> VariantSettings:
        """The settings of the variant `name`; TaskError if there is none."""
        if name not in self.variants:
            raise TaskError(f"no variant {name!r} in params.yaml; there are: {', '.join(self.variants)}")
        return self.variants[name]

    def check_target(self, name: str) -> None:
        """TaskError unless `name` is one of the targets."""
        if name not in self.targets:
            raise TaskError(f"no target {name!r} in params.yaml; there are: {', '.join(self.targets)}")


def load_settings(path: Path) -> Settings:
    """Read and validate params.yaml; TaskError naming each wrong field, its value and the expected one."""
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
    """Validate plain values as Settings; TaskError naming each wrong field, its value and the expected one."""
    if not isinstance(values, Mapping):
        raise TaskError(f"{origin} holds {type(values).__name__}, expected a mapping of sections")
    if old := new_words(values):
        raise TaskError(f"{origin} uses settings of an earlier version; replace them with:\n" + "\n".join(old))
    try:
        return Settings.model_validate(dict(values))
    except ValidationError as error:
        raise TaskError(f"{origin}: " + "; ".join(_explain(e) for e in error.errors())) from error


def _explain(error: Any) -> str:
    """One validation error of pydantic as a readable message."""
    parts = [str(p) for p in error["loc"]]
    where = ".".join(p for p in parts if p != "[key]")
    match error["type"]:
        case "extra_forbidden":
            return f"{where} is not a setting (found {_short(error['input'])}); remove it or fix the spelling"
        case "missing":
            return f"{where} is missing"
        case "value_error":
            # the value of a whole section would only repeat the file
            return f"{where + ': ' if where else ''}{error['ctx']['error']}"
        case _:
            return f"{where} is {_short(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
