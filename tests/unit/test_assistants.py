"""When idle workers are sent to a stage, and when they are called back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from flows.errors import FlowError
from flows.execution import assistants
from flows.execution.assistants import AFTER_ENV, FOLDER, Assistants
from tasks.settings import load_settings

SETTINGS = load_settings(Path("params.yaml"))


class Runner:
    """Records what is submitted; nothing runs."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def submit(self, _: Any, parameters: dict[str, Any]) -> Any:
        self.stages.append(parameters["stage"])
        return self

    def add_done_callback(self, _: Any) -> None:
        pass


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Assistants, Runner, Path]:
    monkeypatch.delenv(AFTER_ENV, raising=False)
    runner = Runner()
    found = Assistants(tmp_path, SETTINGS, runner, lambda _: None, 4, None, tmp_path / "pulse")  # type: ignore[arg-type]
    return found, runner, tmp_path / FOLDER


def running(*stages: str, for_seconds: float = 60) -> dict[str, float]:
    return dict.fromkeys(stages, time.monotonic() - for_seconds)


def test_idle_workers_are_spread_over_the_stages(sent: tuple[Assistants, Runner, Path]) -> None:
    helpers, runner, folder = sent
    assert helpers.send(running("quantize@int8", "quantize@auto")) is None
    assert sorted(runner.stages) == ["quantize@auto", "quantize@int8"]
    assert len(list(folder.iterdir())) == 2
    helpers.send(running("quantize@int8", "quantize@auto"))  # no worker is idle
    assert len(runner.stages) == 2


@pytest.mark.parametrize("stage", ["evaluate@int8", "quantize@base", "statistics"])
def test_other_stages_are_not_helped(stage: str, sent: tuple[Assistants, Runner, Path]) -> None:
    helpers, runner, _ = sent
    assert helpers.send(running(stage)) is None
    assert not runner.stages


def test_a_stage_is_helped_after_a_while(sent: tuple[Assistants, Runner, Path]) -> None:
    helpers, runner, _ = sent
    wait = helpers.send(running("quantize@int8", for_seconds=10))
    assert wait == pytest.approx(assistants.AFTER - 10, abs=1)
    assert not runner.stages


def test_helpers_are_called_back_for_stages(sent: tuple[Assistants, Runner, Path]) -> None:
    helpers, runner, folder = sent
    helpers.send(running("quantize@int8"))
    assert len(runner.stages) == len(list(folder.iterdir())) == 3
    helpers.send(running("quantize@int8", "evaluate@base", "evaluate@auto"))
    assert len(list(folder.iterdir())) == 1
    assert helpers.done("assist 1")
    assert not helpers.done("assist 1")
    assert not helpers.done("quantize@int8")


def test_helpers_are_called_back_when_their_stage_has_ended(sent: tuple[Assistants, Runner, Path]) -> None:
    helpers, _, folder = sent
    helpers.send(running("quantize@int8"))
    helpers.send(running("evaluate@int8"))
    assert list(folder.iterdir()) == []


def test_the_wait_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(AFTER_ENV, "soon")
    with pytest.raises(FlowError, match="MODELPRESS_ASSIST_AFTER is soon; expected a number of seconds"):
        assistants.after()
