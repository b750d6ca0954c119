"""The base class and common types of all sections of params.yaml."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"
SHA256 = r"^[0-9a-f]{64}$"
Name = Annotated[str, Field(pattern=NAME, max_length=40)]
Sha256 = Annotated[str, Field(pattern=SHA256)]
CHAT_DATE = "2024-07-26"  # Llama 3.1's own, where its template finds no date


def _check_date(value: Any) -> Any:
    # without quotes, YAML reads a date
    try:
        valid = isinstance(value, str) and date.fromisoformat(value).isoformat() == value
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f'is {value}, not a date in quotes; write it as "{CHAT_DATE}"')
    return value


Date = Annotated[str, BeforeValidator(_check_date)]


class Section(BaseModel):
    """A section of params.yaml: immutable, strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
