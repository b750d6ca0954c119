"""Where the model and the texts come from: the sections model and calibration, and every data source."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tasks.settings.section import Name, Section, Sha256
from tasks.sources.address import check_data_source, check_model_checksum, check_model_source


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


class TextSource(DataSource):
    """A held-out text for perplexity and divergence."""
