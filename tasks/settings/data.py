"""The sections model and calibration, and data sources."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tasks.settings.section import CHAT_DATE, Date, Name, Section, Sha256
from tasks.sources.address import check_data_source, check_model_checksum, check_model_source


class ModelSettings(Section):
    """The source and precision of the model."""

    source: str
    sha256: Sha256 | None = None
    dtype: Literal["bfloat16", "float16", "float32"]
    licence: str | None = None

    _check_source = field_validator("source")(check_model_source)

    @model_validator(mode="after")
    def _check_checksum(self) -> ModelSettings:
        check_model_checksum(self.source, self.sha256)
        return self


class DataSource(Section):
    """A set of texts or of evaluation items.

    `field`: the key of a record that contains the text, or the list of messages if `chat_template` is true.
    `strip`: a regular expression; matches are removed from the text. `split`: a regular expression that separates the
    documents of a text file. `licence`: an SPDX identifier or a name, for the bill of materials.
    """

    source: str
    sha256: Sha256 | None = None
    format: Literal["text", "jsonl", "parquet"] = "text"
    field: str | None = None
    split: str | None = None
    strip: str | None = None
    licence: str | None = None

    _check_source = field_validator("source")(check_data_source)

    @field_validator("split", "strip")
    @classmethod
    def _check_regex(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"is not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _check_field(self) -> DataSource:
        if self.format == "text" and self.field is not None:
            raise ValueError("field applies only to the formats jsonl and parquet; remove it")
        return self


class CalibrationSource(DataSource):
    """A source of calibration text; `weight`: its share of the tokens, relative to the other sources' weights."""

    weight: Annotated[float, Field(gt=0, strict=False)] = 1.0
    chat_template: bool = False

    @model_validator(mode="after")
    def _require_field(self) -> CalibrationSource:
        if self.format != "text" and self.field is None:
            raise ValueError(f"field is missing: name the key of each {self.format} record that contains the text")
        return self


class Overlap(Section):
    """The allowed overlap of evaluation and calibration data: at most `limit` items share `ngram` words in a row."""

    ngram: Annotated[int, Field(ge=3, le=100)]
    limit: Annotated[int, Field(ge=0)]


class CalibrationSettings(Section):
    """The calibration set. chat_date: what a chat template takes for today, if it asks."""

    samples: Annotated[int, Field(ge=1, le=65536)]
    sequence_length: Annotated[int, Field(ge=16, le=131072)]
    excerpt: Annotated[int, Field(ge=16)] | None = None
    seed: Annotated[int, Field(ge=0)]
    chat_date: Date = CHAT_DATE
    overlap: Overlap
    sources: Annotated[dict[Name, CalibrationSource], Field(min_length=1)]


class TextSource(DataSource):
    """A held-out text for perplexity and divergence."""
