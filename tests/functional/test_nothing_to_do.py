"""A run with nothing to do starts neither a Prefect server nor MLflow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from flows import cli
from flows.execution.nothing_to_do import nothing_to_do
from flows.execution.output_backup import KEPT
from tests.functional.toy import STAGES, Toy


@pytest.fixture
def settled(toy: Toy) -> Toy:
    """A finished toy with a result that a run in this folder has recorded in MLflow."""
    toy.run()
    return toy


def test_it_says_so_and_shows_the_result(settled: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cli, "server")
    done = settled.call("run")
    assert done.returncode == 0, done.stderr
    first, second, table, *_ = done.stdout.splitlines()
    assert first == f"{len(STAGES)} stages: {len(STAGES)} unchanged"
    (run,) = settled.mlflow_runs()
    assert second == f"MLflow: this result is already recorded in run {run.info.run_id}"
    assert table == "the table of the field"


def test_neither_prefect_nor_mlflow_is_imported(settled: Toy) -> None:
    code = (
        "import sys; from pathlib import Path; from flows.execution.nothing_to_do import nothing_to_do; "
        "assert nothing_to_do(Path.cwd()); print({'prefect', 'mlflow', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=settled.root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def change_a_setting(toy: Toy) -> None:
    toy.set(gate__four_bit=0.85)


def lose_the_store(toy: Toy) -> None:
    (toy.root / "mlflow.db").unlink()


def delete_the_record(toy: Toy) -> None:
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{toy.root / 'mlflow.db'}").delete_run(toy.mlflow_runs()[0].info.run_id)


def lose_an_output(toy: Toy) -> None:
    (toy.root / "report/table.txt").unlink()


def leave_a_kept_output(toy: Toy) -> None:
    (toy.root / KEPT / "report").mkdir(parents=True)


def damage_the_note(toy: Toy) -> None:
    (toy.root / ".modelpress/recorded.json").write_text("{")


@pytest.mark.parametrize(
    "happens",
    [change_a_setting, lose_the_store, delete_the_record, lose_an_output, leave_a_kept_output, damage_the_note],
)
def test_otherwise_a_run_is_needed(settled: Toy, happens: Callable[[Toy], None]) -> None:
    assert nothing_to_do(settled.root)
    happens(settled)
    assert nothing_to_do(settled.root) == []


def test_another_store_is_asked_itself(settled: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert nothing_to_do(settled.root) == []
