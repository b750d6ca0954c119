"""Quantize layers in parallel processes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tasks.errors import TaskError
from tasks.grid import Grid, Precision
from tasks.quantizers import QuantizeJob
from tasks.quantizers.parallel import held_beside, press_side_by_side, processes
from tasks.settings import load_settings
from tests.waiting import soon

SMALL, LARGE = 3_500_000, 50_000_000  # weights per layer of models with 135 million and 1 billion weights


@pytest.mark.parametrize(
    ("threads", "layers", "weights", "memory", "expected"),
    [
        (1, 16, LARGE, 64e9, 1),
        (2, 16, LARGE, 64e9, 2),
        (2, 30, SMALL, 64e9, 1),  # starting them would take longer than the work
        (64, 80, 16 * LARGE, 1e12, 30),  # limited by memory
        (64, 4, 16 * LARGE, 1e13, 4),
        (64, 16, LARGE, 1e9, 1),  # even one may not fit; try it anyway
        (2, 0, LARGE, 64e9, 1),
    ],
)
def test_number_of_processes_by_cores_work_and_memory(
    threads: int, layers: int, weights: int, memory: float, expected: int
) -> None:
    assert processes(threads, layers, weights, memory) == expected


def does(folder: Path, layer: int) -> None:
    """The first two layers wait for each other, which requires two processes."""
    (folder / f"layer-{layer}").write_text(f"{os.getpid()} {torch.get_num_threads()}")
    if layer < 2:
        assert soon(lambda: (folder / f"layer-{1 - layer}").exists(), 60)


def refuses(folder: Path, layer: int) -> None:
    if layer == 1:
        raise TaskError("found 3, expected 4")
    sleeps(folder, layer)


def dies(folder: Path, layer: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps(folder: Path, layer: int) -> None:
    (folder / f"pid-{os.getpid()}").touch()
    time.sleep(3000)


def sleeping(folder: Path) -> list[int]:
    """The sleeping processes that still exist."""
    pids = [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]
    return [pid for pid in pids if psutil.pid_exists(pid)]


def test_each_layer_is_quantized_once_with_a_share_of_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    press_side_by_side(partial(does, tmp_path), range(5), ["cpu"] * 2)
    found = [(tmp_path / f"layer-{number}").read_text().split() for number in range(5)]
    assert found[0][0] != found[1][0]
    assert len({pid for pid, _ in found}) == 2
    assert str(os.getpid()) not in {pid for pid, _ in found}
    assert {threads for _, threads in found} == {"2"}
    assert held_beside() > 2 * 10**8


@pytest.mark.parametrize(
    ("press_layer", "kind", "words"), [(refuses, TaskError, "found 3, expected 4"), (dies, MemoryError, "was killed")]
)
def test_failure_in_one_process_ends_all(tmp_path: Path, press_layer: Any, kind: type[Exception], words: str) -> None:
    started = time.monotonic()
    with pytest.raises(kind, match=words):
        press_side_by_side(partial(press_layer, tmp_path), range(2), ["cpu"] * 2)
    assert time.monotonic() - started < 1000
    assert not sleeping(tmp_path)


def test_processes_end_with_a_killed_stage(tmp_path: Path) -> None:
    program = (
        "import sys; from functools import partial; from pathlib import Path\n"
        "from tests.unit.test_parallel import press_side_by_side, sleeps\n"
        "if __name__ == '__main__': press_side_by_side(partial(sleeps, Path(sys.argv[1])), range(2), ['cpu'] * 2)"
    )
    (tmp_path / "stage.py").write_text(program)
    (tmp_path / "work").mkdir()
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    stage = subprocess.Popen([sys.executable, str(tmp_path / "stage.py"), str(tmp_path / "work")], env=env)
    assert soon(lambda: len(sleeping(tmp_path / "work")) == 2, 300)
    stage.kill()
    stage.wait()
    assert soon(lambda: not sleeping(tmp_path / "work"), 60)


@pytest.mark.parametrize("name", ["gptq-int4", "awq-int4", "int8", "auto"])
def test_every_variant_can_be_made_by_another_process(name: str, tmp_path: Path) -> None:
    """The arguments of a process must be picklable."""
    from tasks.quantizers.builtin import _press_alone  # takes seconds to import, also in each process above

    variant = load_settings(Path("params.yaml")).variant(name)
    job = QuantizeJob(tmp_path, torch.zeros(1, 1), tmp_path, variant, "cpu", tmp_path)
    precisions = {"a": Precision(Grid(4, 32, False, torch.float16), False)}
    sent = pickle.loads(pickle.dumps(partial(_press_alone, job, precisions)))
    found, known = sent.args
    assert (found.variant, known) == (variant, precisions)
