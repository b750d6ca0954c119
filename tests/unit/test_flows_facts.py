from __future__ import annotations

import json
from pathlib import Path

import yaml

from flows.graph.dvc_lock import lock_hash
from flows.tracking.run_facts import flatten, git_tags, numbers, variant_facts


def test_settings_become_dotted_names() -> None:
    settings = {"a": {"b": 1, "c": [1, "x"], "d": None}, "e": True, "f": "text", "g": {}}
    assert flatten(settings) == {"a.b": "1", "a.c": '[1, "x"]', "a.d": "null", "e": "true", "f": "text", "g": "{}"}


def test_only_numbers_are_figures() -> None:
    values = {"score": 0.5, "items": 400, "fast": True, "note": "x", "speed": None, "layers": {"q": 0.1}}
    assert dict(numbers(values, "m")) == {"m.score": 0.5, "m.items": 400.0}


def test_the_hash_ignores_the_order_of_stages_and_removed_stages(tmp_path: Path) -> None:
    entries = {"a": {"cmd": "x"}, "b": {"cmd": "y"}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": entries}))
    first = lock_hash(tmp_path, entries)
    swapped = {"b": entries["b"], "gone": {"cmd": "z"}, "a": entries["a"]}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": swapped}, sort_keys=False))
    assert lock_hash(tmp_path, entries) == first
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {**entries, "a": {"cmd": "other"}}}))
    assert lock_hash(tmp_path, entries) != first


def test_facts_of_a_variant_come_from_all_the_files(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(
        "targets: [onnx]\nvariants: {base: {scheme: none}, int8: {scheme: W8A8, smoothing: 0.8}}"
    )
    for path, value in {
        "metrics/quantize/int8.json": {"seconds": 3, "identity": "abc", "layers": {"x": 1}},
        "metrics/evaluate/onnx/int8.json": {"contract": {"limit": 400}, "tasks": {"piqa": {"score": 0.6}}},
        "report/onnx/summary.json": {"variants": {"int8": {"verdict": "pass", "retention": {"low": 0.9}}}},
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(value))
    outs = [{"path": "models/int8", "md5": "m.dir"}]
    exported = [{"path": "exports/onnx/int8", "md5": "e.dir"}]
    (tmp_path / "dvc.lock").write_text(
        yaml.safe_dump({"stages": {"quantize@int8": {"outs": outs}, "export@onnx-int8": {"outs": exported}}})
    )
    base, int8 = variant_facts(tmp_path)
    assert base.metrics == {}
    assert int8.params == {
        "variant": "int8",
        "target": "onnx",
        "scheme": "W8A8",
        "smoothing": "0.8",
        "contract.limit": "400",
    }
    assert int8.metrics == {"quantize.seconds": 3, "evaluate.tasks.piqa.score": 0.6, "report.retention.low": 0.9}
    assert int8.tags == {
        "verdict": "pass",
        "identity": "abc",
        "dvc.models/int8": "m.dir",
        "dvc.exports/onnx/int8": "e.dir",
    }
    assert sorted(int8.files) == ["evaluate", "quantize"]
    (tmp_path / "results/onnx/int8").mkdir(parents=True)
    (tmp_path / "results/onnx/int8/texts.jsonl").touch()
    assert variant_facts(tmp_path)[1].files["results"].name == "texts.jsonl"


def test_there_are_no_tags_outside_a_repository(tmp_path: Path) -> None:
    assert git_tags(tmp_path) == {}
