from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from flows.cli import run
from flows.errors import FlowError
from flows.graph.params_file import override, read_settings

PARAMS = Path(__file__).resolve().parents[2] / "params.yaml"


@pytest.fixture
def params(tmp_path: Path) -> Path:
    return Path(shutil.copy(PARAMS, tmp_path / "params.yaml"))


def test_only_the_changed_line_differs(params: Path) -> None:
    before = params.read_text().splitlines()
    assert override(params, ["variants.int8.smoothing=0.6"]) == ["variants.int8.smoothing: 0.5 -> 0.6"]
    after = params.read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    ((old, new),) = changed
    assert new == old.replace("smoothing: 0.5", "smoothing: 0.6")
    assert "#" in new


def test_a_list_stays_on_its_line_and_null_is_written_out(params: Path) -> None:
    override(params, ["evaluation.tasks=[piqa_local]", "model.licence=null"])
    text = params.read_text()
    assert "tasks: [piqa_local]" in text
    assert "licence: null" in text
    assert read_settings(params).evaluation.tasks == ["piqa_local"]


def test_a_variant_can_be_added_and_removed(params: Path) -> None:
    """The example in the help of `modelpress run`."""
    (example,) = re.findall(r"--set '(\+variants\..*)'", run.__doc__ or "")
    override(params, [example, "~variants.int8"])
    variants = yaml.safe_load(params.read_text())["variants"]
    assert "int8" not in variants
    assert variants["hard"]["smoothing"] == 0.9


def test_every_change_in_the_help_works(params: Path) -> None:
    examples = re.findall(r"--set (?:'([^']+)'|(\S+))", run.__doc__ or "")
    assert len(examples) == 6
    for quoted, plain in examples:
        assert override(Path(shutil.copy(PARAMS, params)), [quoted or plain])


def test_value_that_hydra_cannot_parse_is_text(params: Path) -> None:
    override(params, ["model.source=wheel:mine==1.0/it's (1).gguf"])
    assert read_settings(params).model.source == "wheel:mine==1.0/it's (1).gguf"


def test_no_change_keeps_the_bytes(params: Path) -> None:
    before = params.read_bytes()
    assert override(params, ["variants.int8.smoothing=0.5"]) == []
    assert override(params, []) == []
    assert params.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("variants.int8.smoothing=much", "variants.int8.smoothing is 'much'"),
        ("variants.int8.smothing=1", "--set variants.int8.smothing=1: Could not override"),
        ("+nonsense=1", "nonsense is not a setting"),
        ("~variants.base", "must hold the baseline"),
        ("gate", "expected KEY=VALUE"),
        ("gate.four_bit=[1", "gate.four_bit is '[1'"),
    ],
)
def test_invalid_change_leaves_the_file_unchanged(params: Path, change: str, words: str) -> None:
    before = params.read_bytes()
    with pytest.raises(FlowError) as caught:
        override(params, ["gate.eight_bit=0.9", change])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert params.read_bytes() == before
    assert [p.name for p in params.parent.iterdir()] == ["params.yaml"]
