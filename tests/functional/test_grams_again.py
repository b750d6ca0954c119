"""Gram matrices that are not kept on disk but summed again by each variant: the same bytes, the same identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tasks.activations import inputs
from tasks.activations.inputs import read_inputs
from tasks.activations.store import importance_file, load_few, load_statistics, sums_again
from tasks.errors import TaskError
from tasks.output import checksums, whole_directory
from tasks.quantize import quantize
from tasks.settings import VariantSettings
from tasks.statistics import collect
from tests.functional.test_damage import KINDS
from tests.tiny import Corpus, tiny_model

LENGTH = 48
FEW = 96  # of 192 tokens, each of which goes to 2 of 4 experts: some experts see fewer, some more
VARIANTS = yaml.safe_load(Path("params.yaml").read_text())["variants"]
METHODS: dict[str, dict[str, Any]] = {
    "gptq": VARIANTS["gptq-int4"] | {"group_size": 32},
    "awq": VARIANTS["awq-int4"] | {"group_size": 32},
    "propagated": VARIANTS["gptq-int4"] | {"group_size": 32, "propagate": True},
    "mixed": VARIANTS["auto"] | {"candidates": ["W4A16_ASYM@32", "W8A8"], "bits_per_weight": 6.0, "refine": 0},
}
KEPT, AGAIN = "kept", "again"


class Statistics:
    """A model's statistics both ways."""

    def __init__(self, kind: str, importance: bool, folder: Path, corpus: Corpus) -> None:
        self.folder = folder
        tiny = tiny_model(folder / "tiny", family=kind, changes=KINDS.get(kind, {}))
        with whole_directory(folder / "source") as work:
            for file in tiny.iterdir():
                (work / file.name).write_bytes(file.read_bytes())
        ids = AutoTokenizer.from_pretrained(tiny)(corpus.text.read_text()).input_ids[: 4 * LENGTH]
        with whole_directory(folder / "calibration") as work:
            save_file({"input_ids": torch.tensor(ids).view(-1, LENGTH)}, work / "tokens.safetensors")
        self.reports = {
            way: collect(folder / "source", folder / "calibration", folder / way, importance, FEW, limit)
            for way, limit in ((KEPT, 64.0), (AGAIN, 0.0))
        }


PLAIN = [("llama", False), ("qwen3_moe", False)]


@pytest.fixture(
    scope="module",
    params=[("llama", True), ("qwen3_moe", True), *(pytest.param(p, marks=pytest.mark.slow) for p in PLAIN)],
    ids=lambda param: f"{param[0]}-{'weighed' if param[1] else 'plain'}",
)
def made(request: pytest.FixtureRequest, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    kind, importance = request.param
    return Statistics(kind, importance, tmp_path_factory.mktemp(kind), corpus)


def test_only_the_small_numbers_are_kept(made: Statistics) -> None:
    kept, again = (made.reports[way] for way in (KEPT, AGAIN))
    assert (kept.grams_kept, again.grams_kept) == (True, False)
    assert kept.gram_bytes == again.gram_bytes > 0
    assert kept.few_tokens == again.few_tokens
    assert bool(kept.few_tokens) == (made.folder.name.startswith("qwen3_moe"))
    assert not sums_again(made.folder / KEPT)
    assert not list((made.folder / KEPT).glob("hidden.*"))
    assert {path.name for path in (made.folder / AGAIN).glob("hidden.*")} == {
        f"hidden.{n}.safetensors" for n in range(2)
    }
    assert not [name for name in load_file(made.folder / AGAIN / "layers.0.safetensors") if name.endswith("gram")]
    assert (made.folder / KEPT / "identity.txt").read_bytes() == (made.folder / AGAIN / "identity.txt").read_bytes()


@pytest.mark.parametrize("at_once", [10**9, 1])
def test_sums_are_equal_to_the_last_bit(made: Statistics, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "AT_ONCE", at_once)
    for layer in range(2):
        kept = load_statistics(made.folder / KEPT, layer, "cpu")
        again = read_inputs(made.folder / AGAIN, made.folder / "source", layer, "cpu")
        assert list(again) == list(kept)
        for name, right in kept.items():
            for key in ("gram", "largest", "mean"):
                assert torch.equal(getattr(again[name], key), getattr(right, key)), (name, key)


@pytest.mark.parametrize("method", METHODS)
def test_variants_have_the_same_bytes_and_identity(method: str, made: Statistics, tmp_path: Path) -> None:
    variant = VariantSettings.model_validate(METHODS[method])
    source, calibration = made.folder / "source", made.folder / "calibration"
    reports = [quantize("v", variant, source, calibration, made.folder / way, tmp_path / way) for way in (KEPT, AGAIN)]
    assert checksums(tmp_path / KEPT) == checksums(tmp_path / AGAIN)
    one, two = (replace(report, seconds=0.0, peak_memory_bytes=0) for report in reports)
    assert one == two


def test_other_statistics_are_another_identity(made: Statistics, tmp_path: Path) -> None:
    again = collect(
        made.folder / "source", made.folder / "calibration", tmp_path / "out", not _weighed(made), FEW, 64.0
    )
    assert again.grams_kept
    assert (tmp_path / "out/identity.txt").read_bytes() != (made.folder / KEPT / "identity.txt").read_bytes()


def test_another_routing_than_that_of_the_weights_is_refused(made: Statistics, tmp_path: Path) -> None:
    """As if another processor's rounding sent a token to another expert."""
    if not _weighed(made) or "moe" not in made.folder.name:
        pytest.skip("without weights, or without experts, all tokens are read")
    for file in (made.folder / AGAIN).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(importance_file(tmp_path, 0))
    name = next(n for n in weights if ".experts." in n and n not in load_few(tmp_path, 0))
    save_file(weights | {name: weights[name][:-1]}, importance_file(tmp_path, 0))
    with pytest.raises(TaskError, match="reads other tokens here"):
        read_inputs(tmp_path, made.folder / "source", 0, "cpu")[name]


def _weighed(made: Statistics) -> bool:
    return importance_file(made.folder / KEPT, 0).exists()
