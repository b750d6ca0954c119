"""The evaluate stage on lm-eval's own tasks, with data from a hub."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.functional.project import Checkout, params
from tests.hub import FakeHub, Repository, running_hub
from tests.tiny import Corpus

pytestmark = pytest.mark.slow  # lm-eval reads the definitions of all its tasks

ARC, GSM8K = "datasets/allenai/ai2_arc", "datasets/openai/gsm8k"  # lm-eval's repositories for arc_easy and gsm8k


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A fake hub with both data sets, in their real format."""
    question = {"choices": {"text": ["lamp", "river", "map", "stone"], "label": ["A", "B", "C", "D"]}}
    arc = [{"id": str(i), "question": f"What is {i}?", "answerKey": "ABCD"[i % 4], **question} for i in range(12)]
    gsm8k = [{"question": f"What is {i} + 1?", "answer": f"One more.\n#### {i + 1}"} for i in range(12)]
    with running_hub() as hub:
        hub.repositories[ARC] = _data_set("ARC-Easy", arc)
        hub.repositories[GSM8K] = _data_set("main", gsm8k)
        yield hub


def _data_set(name: str, rows: list[dict[str, Any]]) -> Repository:
    content = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    splits = ("train", "validation", "test")
    about = [{"split": split, "path": f"{name}/{split}-*"} for split in splits]
    readme = f"---\nconfigs: {json.dumps([{'config_name': name, 'data_files': about}])}\n---\n"
    files = {f"{name}/{split}-00000-of-00001.parquet": content.getvalue() for split in splits}
    return Repository({"README.md": readme.encode(), **files})


@pytest.fixture
def checkout(llama: Path, corpus: Corpus, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A checkout in which the baseline is ready for evaluation on both tasks."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    values = params(llama, corpus)
    values["evaluation"] |= {"tasks": ["arc_easy", "gsm8k"], "limit": 8, "sources": {}}
    checkout = Checkout(tmp_path / "project", values)
    shutil.copytree(llama, checkout.root / "exports/transformers/base")
    return checkout


def test_tasks_of_lm_eval_are_scored_item_by_item(checkout: Checkout) -> None:
    checkout.stage("datasets")
    checkout.stage("reference", "transformers")
    checkout.stage("evaluate", "transformers", "base")
    tasks = json.loads((checkout.root / "metrics/evaluate/transformers/base.json").read_text())["tasks"]
    assert (tasks["arc_easy"]["metric"], tasks["arc_easy"]["chance"]) == ("acc_norm", 0.25)
    # generated answers, to which lm-eval applies two filters; only the first counts
    assert (tasks["gsm8k"]["metric"], tasks["gsm8k"]["chance"]) == ("exact_match,strict-match", None)
    for task in ("arc_easy", "gsm8k"):
        lines = (checkout.root / f"results/transformers/base/items-{task}.jsonl").read_text().splitlines()
        assert [json.loads(line)["item"] for line in lines] == list(range(8))
        assert tasks[task]["items"] == 8


def test_data_that_cannot_be_had_is_one_line(checkout: Checkout, hub: FakeHub) -> None:
    del hub.repositories[ARC]
    with pytest.raises(AssertionError) as caught:
        checkout.stage("reference", "transformers")
    said = str(caught.value)
    assert "error: the data of arc_easy, gsm8k cannot be read: " in said
    assert "modelpress doctor" in said
    assert "Traceback" not in said
    assert not (checkout.root / "data/reference").exists()
