"""Detect that a run has nothing to do, without importing Prefect and MLflow, which takes longer than the check."""

from __future__ import annotations

import os
from pathlib import Path

from flows.execution.output_backup import KEPT
from flows.graph.dvc_lock import lock_hash, lock_stages
from flows.graph.params_file import read_settings
from flows.graph.plan import read_plan, summary
from flows.tracking.known_result import known_run
from flows.tracking.mlflow_run import tracking_uri
from flows.workspace.run_lock import exclusive


def nothing_to_do(root: Path) -> list[str]:
    """The lines to print if every stage in `root` is up to date and recorded in MLflow; empty if a run is needed."""
    if os.environ.get("MLFLOW_EXPERIMENT_NAME") or any((root / KEPT).glob("*")):
        return []
    run = known_run(root, tracking_uri(root), lock_hash(root, lock_stages(root)))
    if run is None:
        return []
    read_settings(root / "params.yaml")
    with exclusive(root):
        plan = read_plan(root)
        # dvc.lock must not contain stages that were removed from dvc.yaml
        known = set(plan) == set(lock_stages(root)) and all(stage.state == "unchanged" for stage in plan.values())
    return [summary(plan), f"MLflow: this result is already recorded in run {run}"] if known else []
