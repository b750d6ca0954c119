"""A chat template that asks for today's date gets that of the settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from tasks.runtimes.transformers import TransformersRuntime
from tasks.scoring.contract import contract_hash, contract_of
from tasks.scoring.lm_eval_adapter import RuntimeLM
from tasks.scoring.order import Order
from tasks.settings import CHAT_DATE, EvaluationSettings
from tasks.text.chat import render, writes_date

CHAT = [{"role": "user", "content": "Anna"}]
DATED = "Today Date: {{ strftime_now('%d %b %Y') }}\n"
VALUES = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["evaluation"]


@pytest.fixture
def dated(llama: Path, tmp_path: Path) -> Path:
    """The tiny llama, whose template writes the date."""
    folder = shutil.copytree(llama, tmp_path / "dated")
    template = folder / "chat_template.jinja"
    template.write_text(DATED + template.read_text())
    return folder


def settings(**changes: Any) -> EvaluationSettings:
    return EvaluationSettings.model_validate({**VALUES, "sources": {}, **changes})


def test_the_template_gets_the_date_of_the_settings(llama: Path, dated: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dated)
    assert render(tokenizer, CHAT, "2001-02-03").startswith("Today Date: 03 Feb 2001\n<|user|>Anna")
    model = RuntimeLM(TransformersRuntime(dated, "float32"), 256, 128)
    assert model.apply_chat_template(CHAT).startswith("Today Date: 26 Jul 2024\n")
    other = AutoTokenizer.from_pretrained(llama)
    assert render(other, CHAT, "2001-02-03") == other.apply_chat_template(CHAT, tokenize=False)
    assert (writes_date(tokenizer), writes_date(other)) == (True, False)


def test_the_contract_has_the_date_only_where_prompts_contain_it(llama: Path, dated: Path, tmp_path: Path) -> None:
    texts = {text: {"sha256": "0"} for text in VALUES["texts"]}
    (tmp_path / "sources.json").write_text(json.dumps(texts))
    plain = TransformersRuntime(llama, "float32")
    runtime = TransformersRuntime(dated, "float32")

    def contract(subject: TransformersRuntime, **changes: Any) -> dict[str, Any]:
        return contract_of(settings(**changes), subject, dated, tmp_path, {}, Order(1, {"a": 1}))

    day, other = ({"chat_template": True, "chat_date": date} for date in (CHAT_DATE, "2001-02-03"))
    assert contract(runtime, **other)["chat_date"] == "2001-02-03"
    assert contract_hash(contract(runtime, **day)) != contract_hash(contract(runtime, **other))
    for without in (contract(plain, **day), contract(runtime, chat_template=False)):
        assert "chat_date" not in without
    assert contract_hash(contract(plain, **day)) == contract_hash(contract(plain, **other))


@pytest.mark.parametrize("date", ["yesterday", "2024-7-26", "20240726", 20240726, yaml.safe_load("2024-07-26")])
def test_other_dates_are_refused(date: Any) -> None:
    with pytest.raises(ValueError, match=r'not a date in quotes; write it as "2024-07-26"'):
        settings(chat_date=date)
