"""docs/variants.md matches the settings: every key with its default, every scheme, format and backend."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_core import PydanticUndefined

from tasks.schemes import MIXED, NAMES, NONE, SCHEMES
from tasks.settings import ABILITIES, BACKENDS, BUILTIN, FORMATS, VariantSettings, check_settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/variants.md").read_text(encoding="utf-8")


def table(title: str) -> dict[str, list[str]]:
    """The rows of the first table under a heading, by first cell."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {first.strip("`"): [cell.strip("`") for cell in rest] for first, *rest in (rows[0], *rows[2:])}


def plain(value: Any) -> str:
    """Format a value as in YAML."""
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()


def test_every_key_is_documented_with_its_default() -> None:
    _, *rows = table("Keys").items()
    assert {key for key, _ in rows} == set(VariantSettings.model_fields)
    for key, (_, default, _) in rows:
        known = VariantSettings.model_fields[key].default
        if known not in (None, PydanticUndefined):
            assert default == plain(known), key


def test_every_scheme_is_documented() -> None:
    heading, *rows = table("Schemes").items()
    assert heading[0] == "scheme"
    assert dict(rows) == {
        scheme.name: [
            str(scheme.bits),
            "whole row" if scheme.group_size is None else str(scheme.group_size),
            "yes" if scheme.symmetric else "no",
            "as they are" if scheme.activation_bits is None else f"{scheme.activation_bits} bits",
            {None: "", True: "yes", False: "no"}[scheme.symmetric_activations],
        ]
        for scheme in SCHEMES.values()
    }
    assert not [name for name in (NONE, MIXED, *NAMES) if f"`{name}`" not in PAGE]


def test_formats_and_library_abilities_are_documented() -> None:
    assert list(table("Formats"))[1:] == list(FORMATS)
    (_, libraries), *rows = table("Backends").items()
    assert [BUILTIN, *(name.strip("`") for name in libraries)] == list(BACKENDS)
    assert {key for key, _ in rows} == {key for can in ABILITIES.values() for key in can}
    for key, cells in rows:
        for library, cell in zip(libraries, cells, strict=True):
            can = ABILITIES[library].get(key)
            assert cell == ("any" if can is None else ", ".join(map(plain, can))), f"{key}, {library}"


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_its_example_is_valid(text: str) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert len(check_settings(values | yaml.safe_load(text)).variants) == 5
