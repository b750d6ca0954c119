"""The benchmark suite: valid and comparable contenders, and figures in table and plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bench.contenders import CONTENDERS, DECODING
from bench.goals import BETTER, DECODE, FASTER, INT8, LIBRARIES, TOGETHER, as_json, goals
from bench.picture import WORST, picture
from bench.press import changed, find
from bench.table import rows, table
from tasks.settings import BUILTIN, check_settings, load_settings

SETTINGS = load_settings(Path(__file__).resolve().parents[2] / "params.yaml")


def test_every_contender_is_a_valid_variant() -> None:
    assert len({one.name for one in CONTENDERS}) == len(CONTENDERS)
    for one in CONTENDERS:
        variant = check_settings(changed(SETTINGS, one)).variant(one.variant)
        assert variant.scheme == SETTINGS.variant(one.variant).scheme
        assert one.own == (variant.backend == BUILTIN)
        assert variant.samples is None  # all use the same tokens


def test_decoding_contenders_have_a_supported_8_bit_output_layer() -> None:
    for name in DECODE:
        one = find(name)
        variant = check_settings(changed(SETTINGS, replace(one, changes={**one.changes, **DECODING}))).variant(
            one.variant
        )
        assert one.own
        assert (variant.output_layer, variant.format) == ("W8A16@64", "compressed-tensors")


@pytest.mark.parametrize("name", ["int8", "gptq-int4", "awq-int4"])
def test_ours_and_the_library_have_the_same_settings(name: str) -> None:
    def settings(backend_is_ours: bool) -> list[dict[str, Any]]:
        found = []
        for one in (one for one in CONTENDERS if one.variant == name and one.own == backend_is_ours):
            values = check_settings(changed(SETTINGS, one)).variant(one.variant).model_dump()
            found.append({key: value for key, value in values.items() if key not in ("backend", "format")})
        return found

    assert settings(True)[0] in settings(False)


def found() -> dict[str, Any]:
    def score(news: float, medical: float, kl: float) -> dict[str, Any]:
        texts = {name: {"perplexity": p, "kl": kl, "top1": 0.8} for name, p in (("news", news), ("medical", medical))}
        return {"texts": texts, "score": 0.5 - kl / 10, "bits_per_weight": 4.3}

    return {
        "seconds": {"statistics": 40.0, "ours": 10.0, "theirs": 100.0},
        "peak_memory_bytes": {"statistics": 9e8, "ours": 1e9, "theirs": 3e9},
        "quality": {"base": score(20, 10, 0), "ours": score(22, 11, 0.1), "theirs": score(40000, 30000, 9)},
        "variants": {"ours": "gptq-int4", "theirs": "gptq-int4"},
        "own": ["ours"],
    }


def test_rows_contain_the_measurements() -> None:
    ours, theirs = rows(found())
    assert (ours.seconds, ours.shared, theirs.seconds, theirs.shared) == (10.0, 40.0, 100.0, 0.0)
    assert ours.change == {"news": pytest.approx(0.1), "medical": pytest.approx(0.1)}
    assert ours.kl == pytest.approx(0.1)
    assert ours.retention == pytest.approx(0.98)
    assert table([ours, theirs]).row_count == 2


def test_goals_are_reached_or_missed_by_the_measurements() -> None:
    names = {name for pair in BETTER for name in pair} | {name for ours, theirs, _ in FASTER for name in (ours, theirs)}
    assert names | DECODE.keys() | {INT8[0], *TOGETHER[0], *(n for other in LIBRARIES.values() for n in other)} <= {
        one.name for one in CONTENDERS
    }
    result = found()
    for key in ("seconds", "peak_memory_bytes", "quality", "variants"):
        result[key]["gptq, modelpress"] = result[key].pop("ours")
        result[key]["gptq, llm-compressor"] = result[key].pop("theirs")
    result["own"] = ["gptq, modelpress"]
    told = {goal.what: goal for goal in goals(rows(result), {"int8, modelpress, as in params.yaml": 2.4})}
    speed = told["gptq, modelpress, faster than gptq, llm-compressor"]
    assert (speed.found, speed.promised, speed.reached) == ("10.0x", "3x", True)
    assert told["gptq, modelpress, perplexity, news"].reached
    best = told["best of at most 4.5 bits (gptq, modelpress), perplexity, news"]
    assert (best.found, best.reached) == ("+10.0%", False)
    kept = told["best of at most 4.5 bits (gptq, modelpress), retention"]
    assert (kept.found, kept.reached) == ("98.0%", True)
    decode = told["int8, modelpress, as in params.yaml, decoding in ONNX Runtime GenAI against float32"]
    assert (decode.found, decode.promised, decode.reached) == ("2.40x", "2.5x", False)
    assert json.dumps(as_json(list(told.values())))


def test_a_destroyed_model_does_not_hide_the_others_in_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("bench.picture.FigureCanvasAgg", figures.append)
    assert picture(rows(found())).startswith(b"\x89PNG")
    _, loss = figures[0].axes
    ours, theirs = (bar.get_width() for bar in loss.containers[0])
    assert (ours, theirs) == (pytest.approx(10), 100 * WORST)  # theirs is 200,000% above the baseline
    assert ours > 0.1 * loss.get_xlim()[1]
    assert [text.get_text() for text in loss.texts] == [" +10.0%", " +2.5e+05%, cut off"]
