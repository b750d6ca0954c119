"""The flow with a real git and DVC repository, Prefect server and MLflow store."""

from __future__ import annotations

import re
import shutil
import signal
import sys

import pytest
from prefect import task

from flows.errors import FlowError
from flows.execution import stage_task as stage_module
from flows.execution.stage_task import OutOfMemoryError, StageError, TransientStageError, stage_task
from flows.graph.plan import read_plan
from flows.optimize import PipelineError
from flows.workspace.run_lock import exclusive
from tests.functional.toy import STAGES, VARIANTS, Toy


def test_the_first_run_executes_every_stage_and_leaves_dvc_nothing_to_do(toy: Toy) -> None:
    assert sorted(toy.executed()) == sorted(STAGES)
    assert toy.dvc("status").strip() == "Data and pipelines are up to date."
    assert "Running stage" not in toy.dvc("repro")


def test_a_second_run_starts_no_process_and_makes_no_second_record(toy: Toy) -> None:
    shutil.rmtree(toy.root / ".modelpress/logs")
    assert toy.run() == dict.fromkeys(STAGES, "unchanged")
    assert sorted(toy.executed()) == sorted(STAGES)
    assert not (toy.root / ".modelpress/logs").exists()
    assert [run.info.status for run in toy.mlflow_runs()] == ["FINISHED"]


def test_a_change_of_one_variant_runs_its_stages_and_what_follows(toy: Toy) -> None:
    before = len(toy.executed())
    toy.set(variants__int8__smoothing=0.45)
    plan = read_plan(toy.root)
    assert plan["quantize@int8"].state == "changed"
    assert plan["quantize@int8"].reasons == ("params.yaml: variants.int8 is modified",)
    assert plan["load@int8"].reasons == ("follows quantize@int8",)
    assert plan["quantize@base"].state == "unchanged"

    results = toy.run()
    ran = {"quantize@int8", "load@int8", "report"}
    assert set(toy.executed()[before:]) == ran
    assert {stage for stage, result in results.items() if result == "executed"} == ran
    assert "Running stage" not in toy.dvc("repro")
    assert [run.info.status for run in toy.mlflow_runs()] == ["FINISHED", "FINISHED"]


def test_results_of_earlier_settings_come_from_the_run_cache(toy: Toy) -> None:
    old = toy.read("params.yaml")
    toy.set(variants__int8__smoothing=0.45)
    toy.run()
    before = toy.executed()
    toy.write("params.yaml", old)
    plan = read_plan(toy.root)
    assert {name for name, stage in plan.items() if stage.state == "cached"} >= {"quantize@int8", "load@int8"}

    results = toy.run()
    assert toy.executed() == before
    assert results["quantize@int8"] == "restored"
    # the first run has recorded this result already
    assert len(toy.mlflow_runs()) == 2


def test_after_dvc_repro_a_run_is_all_unchanged(toy: Toy) -> None:
    toy.set(variants__int8__smoothing=0.4)
    toy.dvc("repro")
    before = toy.executed()
    assert toy.run() == dict.fromkeys(STAGES, "unchanged")
    assert toy.executed() == before
    # no run of the flow had recorded this result
    assert [run.info.status for run in toy.mlflow_runs()] == ["FINISHED", "FINISHED"]


def test_a_failed_stage_stops_only_dependent_stages(toy: Toy) -> None:
    model, metrics = toy.read("models/int8/content.json"), toy.read("metrics/quantize/int8.json")
    before = len(toy.executed())
    toy.set(
        variants={
            "base": {"scheme": "none"},
            "int8": {"scheme": "W8A8", "scaling": "smoothquant", "smoothing": 0.3, "rounding": "gptq"},
            **_gptq(32),
        }
    )
    toy.wish("quantize@int8", "fail")
    with pytest.raises(PipelineError) as caught:
        toy.run()

    message = str(caught.value)
    assert "quantize@int8: quantize@int8 found 3, expected 4; fix it (log: " in message
    assert message.endswith(
        "skipped, because they depend on a failed stage: load@int8, report; "
        "finished and kept for the next run: quantize@gptq-int4, load@gptq-int4; unchanged: 3 stages"
    )
    assert sorted(toy.executed()[before:]) == ["load@gptq-int4", "quantize@gptq-int4", "quantize@int8"]
    assert "working on quantize@int8" in toy.read(".modelpress/logs/quantize@int8.log")
    # DVC deleted both before the stage ran, and only one of them is in its cache
    assert toy.read("models/int8/content.json") == model
    assert toy.read("metrics/quantize/int8.json") == metrics
    last = toy.mlflow_runs()[-1]
    assert last.info.status == "FAILED"
    assert "found 3, expected 4" in last.data.tags["error"]

    toy.wish("quantize@int8")
    assert toy.run()["report"] == "executed"


def test_a_load_runs_alone(toy: Toy) -> None:
    before = len(toy.times())
    toy.set(model__source="path:elsewhere")
    for name in VARIANTS:
        toy.wish(f"quantize@{name}", "sleep 2")
    toy.run(jobs=3)
    open_stages: set[str] = set()
    together: set[frozenset[str]] = set()
    for name, what, _ in toy.times()[before:]:
        if what == "start":
            open_stages.add(name)
            together.add(frozenset(open_stages))
        else:
            open_stages.remove(name)
    assert {group for group in together if any("load@" in name for name in group)} == {
        frozenset({f"load@{name}"}) for name in VARIANTS
    }
    # other stages do run in parallel, otherwise the test would prove nothing
    assert any(len(group) > 1 for group in together)


def test_a_stage_that_takes_too_long_is_stopped(toy: Toy) -> None:
    toy.set(gate__four_bit=0.85)
    toy.wish("report", "sleep 600")
    with pytest.raises(PipelineError, match=r"report: stopped after 0\.03 minutes; allow more with --timeout"):
        toy.run(timeout_minutes=0.03)
    assert toy.read("report/table.txt") == "the table of the field\n"


def test_invalid_settings_are_refused_before_any_stage_runs(toy: Toy) -> None:
    before = toy.executed()
    toy.set(gate__four_bit=0.9)
    toy.wish("preflight", "error: group_size is 7")
    with pytest.raises(FlowError, match=r"^group_size is 7$"):
        toy.run()
    (toy.root / "tasks/checks/preflight.py").unlink()
    with pytest.raises(FlowError, match=r"has no tasks/checks/preflight\.py"):
        toy.run()
    assert toy.executed() == before


def test_two_runs_in_one_checkout_are_refused(toy: Toy) -> None:
    with exclusive(toy.root), pytest.raises(FlowError, match=r"another run \(process \d+\) is active in"):
        toy.run()


@pytest.mark.parametrize(
    ("error", "again"),
    [(TransientStageError("busy"), True), (StageError("broken"), False), (OutOfMemoryError("too large"), False)],
)
def test_only_transient_errors_are_retried(prefect_server: str, error: Exception, again: bool) -> None:
    @task(retries=1, retry_condition_fn=stage_task.retry_condition_fn)
    def fail() -> None:
        tries.append(1)
        raise error

    tries: list[int] = []
    with pytest.raises(type(error)):
        fail()
    assert len(tries) == (2 if again else 1)


def test_a_stage_without_a_network_is_retried_until_it_works(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stage_module, "WAITS", (0.1, 0.2, 0.3))
    before = len(toy.executed())
    toy.set(gate__four_bit=0.85)
    toy.wish("report", "away 2")
    assert toy.run()["report"] == "executed"
    assert toy.executed()[before:] == ["report"] * 3
    told = [line for line in caplog.text.splitlines() if "retrying" in line]
    assert len(told) == 2
    assert "report: the hub is away (log: " in told[0]
    assert told[0].endswith("retrying in 0.1 s (1 of 3)")
    assert told[1].endswith("retrying in 0.2 s (2 of 3)")


def test_a_permanent_network_failure_fails_the_run_after_the_last_retry(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "WAITS", (0.0, 0.0, 0.0))
    before = len(toy.executed())
    toy.set(model__source="path:elsewhere")
    toy.wish("download", "away 9")
    with pytest.raises(PipelineError, match="download: the hub is away"):
        toy.run()
    assert toy.executed()[before:] == ["download"] * 4


def test_a_termination_does_not_wait_for_the_next_retry(toy: Toy, prefect_server: str) -> None:
    toy.set(model__source="path:elsewhere")
    toy.wish("download", "away 9")
    longer = "from flows.execution import stage_task; stage_task.WAITS = (600.0,); from flows.cli import main; main()"
    process = toy.start([sys.executable, "-c", longer, "run"], PREFECT_API_URL=prefect_server)
    assert process.stdout is not None
    try:
        while "retrying in 600 s" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 143


@pytest.mark.parametrize(
    ("wish", "what"),
    [
        ("killed", "killed, most likely by the system because memory ran out"),
        ("no memory", "out of memory"),
    ],
)
def test_a_stage_without_enough_memory_names_its_peak_and_what_to_lower(toy: Toy, wish: str, what: str) -> None:
    before = len(toy.executed())
    toy.set(variants__int8__smoothing=0.3)
    toy.wish("quantize@int8", wish)
    with pytest.raises(PipelineError) as caught:
        toy.run()
    message = re.search(
        rf"quantize@int8: {what}; its peak was (\d+\.\d) GB of (\d+\.\d) GB; lower "
        r"calibration\.samples in params\.yaml, or run one stage at a time \(--jobs 1\)",
        str(caught.value),
    )
    assert message, caught.value
    # the stage allocates 300 MB, in addition to Python and DVC
    assert 0.3 <= float(message[1]) < float(message[2])
    assert toy.executed()[before:] == ["quantize@int8"]  # no retry


def _gptq(group_size: int) -> dict[str, object]:
    # in the format awq, the group size must divide the width of every layer
    settings = {"scheme": "W4A16_ASYM", "group_size": group_size, "rounding": "gptq", "format": "awq"}
    return {"gptq-int4": settings}
