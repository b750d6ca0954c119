"""Find out that a run has nothing to do, without Prefect and MLflow, whose start takes longer than that."""

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
    """What to say where every stage in `root` is up to date and MLflow has the result; empty where a run is needed."""
    if os.environ.get("MLFLOW_EXPERIMENT_NAME") or any((root / KEPT).glob("*")):
        return []
    run = known_run(root, tracking_uri(root), lock_hash(root, lock_stages(root)))
    if run is None:
        return []
    read_settings(root / "params.yaml")
    with exclusive(root):
        plan = read_plan(root)
        # what dvc.lock says of stages that are gone is no part of a result
        known = set(plan) == set(lock_stages(root)) and all(stage.state == "unchanged" for stage in plan.values())
    return [summary(plan), f"MLflow: nothing new, this result is in run {run}"] if known else []
