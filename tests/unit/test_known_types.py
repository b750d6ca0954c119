"""What the trial of all types found, and that it is refused by config.json alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import CONFIG_MAPPING

from tasks.checks.preflight import check_announced
from tasks.errors import TaskError
from tasks.settings import Settings, check_settings
from tasks.sources import known_types
from tasks.sources.choice import check_config
from tasks.sources.known_types import FILE, known_type
from tools.models import NOT_BUILT, VLLM_VERSION
from tools.tiny_models import TYPES, tiny_config

PAGE = Path("docs/models.md").read_text(encoding="utf-8")
ROWS = {cells[0]: cells[1:] for cells in (line[2:].split(" | ") for line in PAGE.splitlines() if line[:2] == "| ")}
KNOWN = json.loads(FILE.read_text(encoding="utf-8"))


def settings(target: str = "transformers") -> Settings:
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    values["calibration"]["sequence_length"] = values["evaluation"]["window"] = 64
    values["benchmark"] |= {"prompt_tokens": 8, "new_tokens": 4}
    return check_settings(
        values | {"targets": [target], "variants": {n: values["variants"][n] for n in ("base", "int8")}}
    )


def test_the_file_says_what_the_page_says() -> None:
    assert f"Transformers {KNOWN['transformers']} has" in PAGE
    assert KNOWN["vllm"] == VLLM_VERSION
    rows = {kind: row for kind, row in ROWS.items() if kind in TYPES}
    assert rows.keys() == KNOWN["types"].keys() == TYPES.keys()
    for kind, row in rows.items():
        assert (KNOWN["types"][kind]["refused"] is None) == (row[:5] == ["+"] * 5), kind
        engines = {"Transformers": row[6] == "yes", "vLLM": row[7] == "yes"}
        assert KNOWN["types"][kind]["engines"] == [name for name, reads in engines.items() if reads], kind


@pytest.mark.parametrize("kind", [kind for kind, one in KNOWN["types"].items() if one["refused"]])
def test_a_type_that_does_not_pass_is_refused_by_name(kind: str) -> None:
    config = {"model_type": kind, "architectures": [TYPES[kind]], "is_decoder": True}
    with pytest.raises(TaskError, match=f"^here is a {kind} model") as caught:
        check_config(config, "here")
    assert "\n" not in str(caught.value)
    assert NOT_BUILT not in str(caught.value).partition("a tiny one")[0]


def test_a_type_that_no_engine_reads_is_refused_by_name(tmp_path: Path) -> None:
    kind = next(kind for kind, one in KNOWN["types"].items() if not one["engines"] and not one["refused"])
    config = tiny_config(kind)
    config.architectures = [TYPES[kind]]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    said = f"no engine is known that reads a quantized {kind} model: tried were Transformers .*, vLLM"
    with pytest.raises(TaskError, match=said):
        check_announced(settings(), tmp_path / "config.json", tmp_path)


def test_types_that_pass_are_not_refused() -> None:
    for kind in ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3", "gpt_oss", "deepseek_v3"):
        check_config({"model_type": kind, "architectures": [TYPES[kind]]}, "here")
        assert (found := known_type(kind)) is not None
        assert found.engines


def test_nothing_is_known_of_other_versions_and_with_the_library_that_lacked(monkeypatch: pytest.MonkeyPatch) -> None:
    needy = next(kind for kind, one in KNOWN["types"].items() if one.get("needs"))
    assert known_type(needy) is not None
    with monkeypatch.context() as patch:
        patch.setattr(known_types, "find_spec", lambda name: name == KNOWN["types"][needy]["needs"])
        assert known_type(needy) is None
    assert known_type("mine") is None
    monkeypatch.setattr(known_types, "version", lambda name: "9.9")
    assert known_type("xlm") is None


def test_every_type_of_the_file_is_one_of_transformers() -> None:
    assert not [kind for kind in KNOWN["types"] if kind not in CONFIG_MAPPING]
    assert all(re.fullmatch(r"[^\n]{4,}", str(one["refused"])) for one in KNOWN["types"].values())
