"""The record of a run in a real MLflow store."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from flows.graph.plan import read_plan
from flows.tracking.mlflow_run import recorded
from tests.functional.toy import VARIANTS, Toy

LOG = logging.getLogger("test")


def test_a_run_has_a_parent_record_and_a_child_per_variant(finished_toy: Toy) -> None:
    (parent,) = finished_toy.mlflow_runs()
    params = yaml.safe_load(finished_toy.read("params.yaml"))
    assert parent.data.params["model.source"] == params["model"]["source"]
    assert parent.data.params["gate.four_bit"] == "0.9"
    assert parent.data.metrics["executed"] == 8
    assert parent.data.tags["winner.transformers"] == "int8"
    assert parent.data.tags["git.commit"] == finished_toy.command("git", "rev-parse", "HEAD").strip()
    assert len(parent.data.tags["prefect.flow_run_id"]) == 36
    client = MlflowClient(f"sqlite:///{finished_toy.root / 'mlflow.db'}")
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"dvc.lock", "params.yaml", "content.json", "table.txt", "transformers"}

    children = {run.info.run_name: run for run in finished_toy.mlflow_runs(parents=False)}
    assert set(children) == {f"transformers-{name}" for name in VARIANTS}
    child = children["transformers-gptq-int4"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {key: child.data.params[key] for key in ("scheme", "group_size", "rounding")} == {
        "scheme": "W4A16_ASYM",
        "group_size": "64",
        "rounding": "gptq",
    }
    assert child.data.metrics["report.retention.low"] == 0.95
    assert child.data.metrics["quantize.seconds"] > 0
    assert not any("layers" in name for name in child.data.metrics)
    assert child.data.tags["verdict"] == "pass"
    locked = yaml.safe_load(finished_toy.read("dvc.lock"))["stages"]["quantize@gptq-int4"]["outs"]
    assert child.data.tags["dvc.models/gptq-int4"] == locked[1]["md5"]


def test_the_parent_record_exists_from_the_start_and_has_the_final_status(toy: Toy) -> None:
    toy.set(gate__four_bit=0.85)
    plan = read_plan(toy.root)
    seen = []
    with contextlib.suppress(KeyboardInterrupt), recorded(toy.root, toy.root, plan, LOG, {"name": "one"}):
        seen.append(toy.mlflow_runs()[-1].info.status)
        raise KeyboardInterrupt
    assert seen == ["RUNNING"]
    assert toy.mlflow_runs()[-1].info.status == "KILLED"
    assert toy.mlflow_runs()[-1].info.run_name == "one"


def test_the_next_run_closes_the_record_of_a_killed_one(toy: Toy) -> None:
    toy.set(gate__four_bit=0.85)
    plan = read_plan(toy.root)
    dead = recorded(toy.root, toy.root, plan, LOG, {"name": "dead"})
    dead.__enter__()  # never exited
    assert toy.mlflow_runs()[-1].info.status == "RUNNING"
    with recorded(toy.root, toy.root, plan, LOG, {"name": "next"}):
        statuses = {run.info.run_name: run.info.status for run in toy.mlflow_runs()}
        assert statuses["dead"] == "KILLED"
        assert statuses["next"] == "RUNNING"


def test_an_unreachable_store_loses_the_record_but_not_the_results(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    toy.set(gate__four_bit=0.85)
    assert toy.run()["report"] == "executed"
    assert "MLflow at http://127.0.0.1:9 does not work" in caplog.text
    assert "the results are complete, but not recorded" in caplog.text


def test_a_store_from_the_environment_is_used(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(toy.mlflow_runs())
    (tmp_path / "own.db").write_bytes((toy.root / "mlflow.db").read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'own.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    toy.run()
    client = MlflowClient()
    mine = client.get_experiment_by_name("mine")
    assert mine is not None
    assert len(client.search_runs([mine.experiment_id], "attributes.status = 'FINISHED'")) == 1 + len(VARIANTS)
    assert len(toy.mlflow_runs()) == before
