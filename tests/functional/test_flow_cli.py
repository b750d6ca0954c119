"""`modelpress` on the command line: output, exit status and signals."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.functional.toy import STAGES, Toy
from tests.waiting import soon


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("variants.int8.smoothing=7", "variants.int8.smoothing is 7"),
        ("variants.int8.smothing=0.5", "variants.int8.smothing"),
        ("+variants.int8.smothing=0.5", "variants.int8.smothing is not a setting"),
        ("gate", "expected KEY=VALUE"),
        ("~variants.base", "must hold the baseline"),
    ],
)
def test_a_bad_change_is_refused_before_anything_starts(toy: Toy, change: str, words: str) -> None:
    before = toy.read("params.yaml")
    done = toy.call("run", "--set", "gate.four_bit=0.85", "--set", change)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert done.stdout == ""
    assert toy.read("params.yaml") == before


def test_a_change_stays_in_the_file_and_the_result_is_shown(toy: Toy, prefect_server: str) -> None:
    toy.write("params.yaml", "# a comment that must stay\n" + toy.read("params.yaml"))
    done = toy.call("run", "--set", "gate.four_bit=0.85", PREFECT_API_URL=prefect_server)
    assert done.returncode == 0, done.stderr
    assert "params.yaml: gate.four_bit: 0.9 -> 0.85" in done.stderr
    assert "# a comment that must stay" in toy.read("params.yaml")
    assert done.stdout.splitlines()[0] == "the table of the field"
    assert f"sqlite:///{toy.root}/mlflow.db" in done.stdout
    assert "report: executed; 8 of 8 stages done" in done.stderr
    assert "| report               | working on report" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Finished in state" not in done.stderr
    assert toy.dvc("status").strip() == "Data and pipelines are up to date."


def test_a_failed_stage_is_one_clear_line(toy: Toy, prefect_server: str) -> None:
    toy.wish("report", "fail")
    toy.set(gate__four_bit=0.85)
    done = toy.call("run", PREFECT_API_URL=prefect_server)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: report: report found 3, expected 4; fix it (log: ")


def test_a_plan_shows_actions_and_reasons_and_changes_nothing(toy: Toy) -> None:
    toy.set(variants__int8__smoothing=0.45)
    lock = toy.read("dvc.lock")
    done = toy.call("plan")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert rows["quantize@int8"][1:6] == ["run", "params.yaml:", "variants.int8", "is", "modified"]
    assert rows["load@int8"][1:4] == ["run", "follows", "quantize@int8"]
    assert rows["quantize@base"][1] == "-"
    assert "8 stages: 3 to run, 5 unchanged" in done.stdout
    assert toy.read("dvc.lock") == lock
    assert len(toy.executed()) == len(STAGES)


def test_the_last_report_is_shown_again(toy: Toy) -> None:
    assert toy.cli("report").stdout.startswith("the table of the field\n")
    (toy.root / "report/table.txt").unlink()
    done = toy.call("report")
    assert (done.returncode, done.stderr) == (1, "error: there is no report yet; create one with `modelpress run`\n")


def test_usage_errors_and_failed_runs_have_different_statuses(toy: Toy, tmp_path: Path) -> None:
    assert toy.cli("run", "--jobs", "0").returncode == 2
    assert toy.cli("rum").returncode == 2
    assert toy.cli("--version").stdout.startswith("modelpress ")
    empty = tmp_path / "empty"
    empty.mkdir()
    done = Toy(empty).cli("plan")
    assert done.returncode == 1
    assert "no dvc.yaml in" in done.stderr


def test_ctrl_c_ends_the_stage_and_is_recorded(toy: Toy, prefect_server: str) -> None:
    with _running_stage(toy, "quantize@int8", PREFECT_API_URL=prefect_server) as process:
        stage = int(toy.read("pid-quantize@int8"))
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert output.splitlines()[-1].startswith("interrupted; ")
    assert "Traceback" not in output
    assert not psutil.pid_exists(stage)
    assert toy.mlflow_runs()[-1].info.status == "KILLED"
    assert (toy.root / "models/int8/content.json").exists()


def test_a_killed_run_leaves_no_process_and_loses_nothing(toy: Toy) -> None:
    old = toy.read("models/int8/content.json")
    # the run starts its own Prefect server, which must end too
    with _running_stage(toy, "quantize@int8", PREFECT_API_URL="") as process:
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("uvicorn" in " ".join(child.cmdline()) for child in family)
        family.append(psutil.Process(int(toy.read("pid-quantize@int8"))))
        assert not (toy.root / "models/int8").exists()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
    assert soon(lambda: not any(child.is_running() for child in family), 60)

    toy.wish("quantize@int8", "fail")
    with pytest.raises(Exception, match="found 3, expected 4"):
        toy.run()
    assert toy.read("models/int8/content.json") == old
    assert [run.info.status for run in toy.mlflow_runs()][1:] == ["KILLED", "FAILED"]


class _running_stage:  # noqa: N801 - reads as a phrase
    """`modelpress run` with `stage` running; killed at the end if it has not ended."""

    def __init__(self, toy: Toy, stage: str, **env: str) -> None:
        toy.set(variants__int8__smoothing=0.45)
        toy.wish(stage, "sleep 600")
        self._process = toy.start_cli("run", **env)
        self._mark = toy.root / f"pid-{stage}"

    def __enter__(self) -> subprocess.Popen[str]:
        assert soon(self._mark.exists, 300), self._process.communicate(timeout=5)
        return self._process

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
