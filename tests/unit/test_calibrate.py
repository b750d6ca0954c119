"""Pack calibration text, and find evaluation items in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tasks.calibrate import calibrate, shares
from tasks.errors import TaskError
from tasks.output import checksums
from tasks.settings import CalibrationSettings, DataSource, Overlap
from tasks.text.contamination import check_overlap, find_overlap, ngrams
from tests.tiny import Corpus

LENGTH = 32


def settings(**changes: Any) -> CalibrationSettings:
    values = {
        "samples": 8,
        "sequence_length": LENGTH,
        "seed": 1,
        "overlap": {"ngram": 8, "limit": 0},
        "sources": {
            "text": {"source": "path:x", "weight": 3, "split": "\n\n"},
            "chats": {
                "source": "path:x",
                "format": "jsonl",
                "field": "messages",
                "chat_template": True,
                "weight": 1,
            },
        },
    }
    return CalibrationSettings.model_validate({**values, **changes})


@pytest.fixture
def raw(tmp_path: Path, corpus: Corpus) -> Path:
    for name, file in {"text": corpus.text, "chats": corpus.chats, "piqa": corpus.piqa}.items():
        folder = tmp_path / "raw" / name
        folder.mkdir(parents=True)
        shutil.copy(file, folder / f"data{file.suffix}")
    return tmp_path / "raw"


def test_sequences_are_shared_by_weight(llama: Path, raw: Path, tmp_path: Path) -> None:
    report = calibrate(settings(), {}, llama, raw, tmp_path / "out")
    ids = load_file(tmp_path / "out/tokens.safetensors")["input_ids"]
    assert tuple(ids.shape) == (8, LENGTH)
    assert {name: source.sequences for name, source in report.sources.items()} == {"text": 6, "chats": 2}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert report.vocabulary == len(tokenizer)
    assert report.vocabulary_seen == len(ids.unique())
    assert json.loads((tmp_path / "out/calibration.json").read_text())["tokens"] == 8 * LENGTH


@pytest.mark.parametrize(("excerpt", "cuts"), [(16, (16, 16)), (24, (24, 8)), (None, (32,)), (64, (32,))])
def test_a_sequence_consists_of_excerpts(
    llama: Path, raw: Path, tmp_path: Path, excerpt: int | None, cuts: tuple[int, ...]
) -> None:
    one = settings(excerpt=excerpt, sources={"text": {"source": "path:x"}})
    report = calibrate(one, {}, llama, raw, tmp_path / "out")
    assert (report.sources["text"].sequences, report.sources["text"].excerpts) == (8, 8 * len(cuts))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    stream = tokenizer((raw / "text/data.txt").read_text().strip(), add_special_tokens=False).input_ids
    places = {tuple(stream[i : i + cuts[0]]) for i in range(0, len(stream), cuts[0])}
    for row in load_file(tmp_path / "out/tokens.safetensors")["input_ids"].tolist():
        first, *others = torch.tensor(row).split(cuts)
        assert tuple(first.tolist()) in places
        for other in others:
            assert any(place[: len(other)] == tuple(other.tolist()) for place in places)


def test_bytes_depend_on_the_seed(llama: Path, raw: Path, tmp_path: Path) -> None:
    sums = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        calibrate(settings(seed=seed), {}, llama, raw, tmp_path / name)
        sums.append(checksums(tmp_path / name)["tokens.safetensors"])
    assert sums[0] == sums[1] != sums[2]


def test_the_chat_template_is_applied(llama: Path, raw: Path, tmp_path: Path) -> None:
    only_chats = {"chats": settings().sources["chats"].model_dump()}
    calibrate(settings(sources=only_chats), {}, llama, raw, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    template = str(tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False))
    marker = template[: template.index("x")]
    assert marker in tokenizer.decode(load_file(tmp_path / "out/tokens.safetensors")["input_ids"].flatten())


def test_short_documents_and_other_values_are_dropped_and_counted(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "raw/set").mkdir(parents=True)
    rows = ["A text that is long enough to be worth its place. " * 9] * 40 + ["short", "", 7, None]
    (tmp_path / "raw/set/data.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    one = settings(sources={"set": {"source": "path:x", "format": "jsonl", "field": "text"}})
    report = calibrate(one, {}, llama, tmp_path / "raw", tmp_path / "out")
    assert report.sources["set"].documents == 44
    assert report.sources["set"].dropped == {"too short": 2, "not text": 2}
    # with the chat template, a null is no message either
    chats = settings(sources={"set": {"source": "path:x", "format": "jsonl", "field": "text", "chat_template": True}})
    (tmp_path / "raw/set/data.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in [*rows[:40], None])
    )
    report = calibrate(chats, {}, llama, tmp_path / "raw", tmp_path / "chats")
    assert report.sources["set"].dropped == {"not text": 1}


def test_too_little_text_names_the_source_and_its_tokens(llama: Path, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"calibration source \w+ has \d+ tokens, its share is"):
        calibrate(settings(samples=60000), {}, llama, raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (raw / "text/data.txt").write_text("short\n\n" * 3)
    with pytest.raises(TaskError, match=r"text has 0 tokens, .*; 4 documents, 4 too short\);"):
        calibrate(settings(), {}, llama, raw, tmp_path / "out")


def test_missing_field_names_the_existing_fields(llama: Path, raw: Path, tmp_path: Path) -> None:
    wrong = {"chats": {"source": "path:x", "format": "jsonl", "field": "body"}}
    with pytest.raises(TaskError, match=r"no field 'body'.*messages"):
        calibrate(settings(sources=wrong), {}, llama, raw, tmp_path / "out")


def test_evaluation_items_in_the_text_are_refused(llama: Path, raw: Path, tmp_path: Path, corpus: Corpus) -> None:
    stolen = corpus.text.read_text().split("\n\n")
    (raw / "quiz").mkdir()
    rows = [{"question": "What is it that nobody has ever written down anywhere before now?"}]
    rows += [{"question": text} for text in stolen]
    (raw / "quiz/data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiz = {"quiz": DataSource(source="path:x", format="jsonl")}
    with pytest.raises(TaskError, match=r"quiz: items \d+, .*overlap\.limit"):
        calibrate(settings(), quiz, llama, raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    allowed = calibrate(settings(overlap={"ngram": 8, "limit": 1000}), quiz, llama, raw, tmp_path / "out")
    assert allowed.overlap["quiz"].items == len(rows)
    assert 0 not in allowed.overlap["quiz"].first
    assert allowed.overlap["quiz"].matching > 0


def test_overlap_counts_items_that_are_too_short_to_match(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/data.jsonl").write_text('{"a": "one two"}\n{"a": "one two three", "b": ["Four!"]}\n')
    match = find_overlap(
        tmp_path, "set", DataSource(source="path:x", format="jsonl"), ngrams("zero, one Two three four", 4), 4
    )
    assert (match.items, match.short, match.matching, match.first) == (2, 1, 1, [1])
    check_overlap({"set": match}, Overlap(ngram=4, limit=1))


@pytest.mark.parametrize(
    ("samples", "weights", "expected"),
    [(10, (1, 1, 1), (4, 3, 3)), (7, (2, 1, 1), (3, 2, 2)), (1, (1, 5), (0, 1)), (6, (1, 2), (2, 4))],
)
def test_shares_sum_to_the_samples(samples: int, weights: tuple[int, ...], expected: tuple[int, ...]) -> None:
    sources = {f"s{i}": {"source": "path:x", "weight": w} for i, w in enumerate(weights)}
    assert tuple(shares(settings(samples=samples, sources=sources)).values()) == expected


def test_params_yaml_calibrates_on_other_data_than_it_evaluates_on() -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    evaluation = {s["source"] for group in ("sources", "texts") for s in params["evaluation"][group].values()}
    assert not evaluation & {s["source"] for s in params["calibration"]["sources"].values()}


def test_a_sequence_of_chats_has_one_bos_even_if_the_template_writes_it(llama: Path, raw: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(model)
    only_chats = {"chats": settings().sources["chats"].model_dump()}
    calibrate(settings(sources=only_chats), {}, model, raw, tmp_path / "out")
    rows = load_file(tmp_path / "out/tokens.safetensors")["input_ids"]
    assert rows[:, 0].tolist() == [0] * len(rows)
    assert (rows == 0).sum() == len(rows)


def test_bytes_depend_on_the_settings_date_and_not_on_the_day(llama: Path, raw: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    only_chats = {"chats": settings().sources["chats"].model_dump()}
    calibrate(settings(sources=only_chats, chat_date="2001-02-03"), {}, model, raw, tmp_path / "out")
    rows = load_file(tmp_path / "out/tokens.safetensors")["input_ids"]
    assert "03 Feb 2001" in AutoTokenizer.from_pretrained(llama).decode(rows.flatten())
