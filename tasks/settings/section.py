"""The base class and common types of all sections of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"
SHA256 = r"^[0-9a-f]{64}$"
Name = Annotated[str, Field(pattern=NAME, max_length=40)]
Sha256 = Annotated[str, Field(pattern=SHA256)]


class Section(BaseModel):
    """A section of params.yaml: immutable, strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
