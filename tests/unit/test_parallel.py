"""Layers pressed side by side, by processes of their own."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch

from tasks.errors import TaskError
from tasks.quantizers import QuantizeJob
from tasks.quantizers.parallel import held_beside, press_side_by_side, processes
from tests.waiting import soon

SMALL, LARGE = 3_500_000, 50_000_000  # weights of a layer, of models of 135 million and a billion


@pytest.mark.parametrize(
    ("threads", "layers", "weights", "memory", "expected"),
    [
        (1, 16, LARGE, 64e9, 1),
        (2, 16, LARGE, 64e9, 2),
        (2, 30, SMALL, 64e9, 1),  # they would start for longer than they work
        (64, 80, 16 * LARGE, 1e12, 30),  # as many as there is memory for
        (64, 4, 16 * LARGE, 1e13, 4),
        (64, 16, LARGE, 1e9, 1),  # what does not fit once is for the system to tell
        (2, 0, LARGE, 64e9, 1),
    ],
)
def test_there_are_as_many_as_have_a_core_work_and_memory(
    threads: int, layers: int, weights: int, memory: float, expected: int
) -> None:
    assert processes(threads, layers, weights, memory) == expected


def job(folder: Path) -> QuantizeJob:
    return QuantizeJob(folder, torch.zeros(1, 1), folder, cast("Any", None), "cpu", folder)


def does(job: QuantizeJob) -> None:
    assert job.share
    for number in range(job.share[0], 5, job.share[1]):
        (job.destination / f"layer-{number}").write_text(f"{os.getpid()} {torch.get_num_threads()}")


def refuses(job: QuantizeJob) -> None:
    if job.share == (1, 2):
        raise TaskError("found 3, expected 4")
    sleeps(job)


def dies(job: QuantizeJob) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps(job: QuantizeJob) -> None:
    (job.destination / f"pid-{os.getpid()}").touch()
    time.sleep(300)


def sleeping(folder: Path) -> list[int]:
    """The processes that slept there and still exist."""
    pids = [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]
    return [pid for pid in pids if psutil.pid_exists(pid)]


def test_each_has_its_share_of_the_layers_and_of_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    press_side_by_side(job(tmp_path), does, 2, lambda: 5 - len(list(tmp_path.iterdir())))
    found = [(tmp_path / f"layer-{number}").read_text().split() for number in range(5)]
    assert len({pid for pid, _ in found[::2]}) == len({pid for pid, _ in found[1::2]}) == 1
    assert found[0][0] != found[1][0]
    assert str(os.getpid()) not in {pid for pid, _ in found}
    assert {threads for _, threads in found} == {"2"}
    assert held_beside() > 2 * 10**8


@pytest.mark.parametrize(
    ("again", "kind", "words"), [(refuses, TaskError, "found 3, expected 4"), (dies, MemoryError, "was killed")]
)
def test_what_goes_wrong_in_one_ends_all(tmp_path: Path, again: Any, kind: type[Exception], words: str) -> None:
    started = time.monotonic()
    with pytest.raises(kind, match=words):
        press_side_by_side(job(tmp_path), again, 2, lambda: 1)
    assert time.monotonic() - started < 100
    assert not sleeping(tmp_path)


def test_nothing_is_left_of_them_when_the_stage_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.unit.test_parallel import job, press_side_by_side, sleeps\n"
        "if __name__ == '__main__': press_side_by_side(job(Path(sys.argv[1])), sleeps, 2, lambda: 1)"
    )
    (tmp_path / "stage.py").write_text(program)
    (tmp_path / "work").mkdir()
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    stage = subprocess.Popen([sys.executable, str(tmp_path / "stage.py"), str(tmp_path / "work")], env=env)
    assert soon(lambda: len(sleeping(tmp_path / "work")) == 2, 60)
    stage.kill()
    stage.wait()
    assert soon(lambda: not sleeping(tmp_path / "work"), 10)


@pytest.mark.parametrize("form", ["compressed-tensors", "awq", "gptq"])
def test_every_format_can_be_made_by_another_process(form: str, tmp_path: Path) -> None:
    from tasks.quantizers.grouped import FORMS, press_grouped  # takes seconds, for each of the processes above, too

    again = partial(press_grouped, form=FORMS[form], grids={}, how=cast("Any", None), skip=[])
    sent, share = pickle.loads(pickle.dumps((again, replace(job(tmp_path), share=(0, 2)))))
    assert sent.keywords["form"] == FORMS[form]
    assert share.share == (0, 2)
