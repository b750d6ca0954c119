"""A run's artifacts in Prefect's UI: plan, result table, summary with plot, links."""

from __future__ import annotations

import base64
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.graph.plan import ACTIONS, Plan
from flows.tracking.mlflow_run import find_run
from flows.tracking.result_markdown import result
from flows.tracking.run_facts import summaries
from tasks.reporting.columns import columns, one_line

MLFLOW_UI = "MODELPRESS_MLFLOW_UI"  # environment variable with the address of MLflow's UI


class ProgressArtifact:
    """A stage's progress in Prefect's UI: created on the first report, then updated."""

    def __init__(self, stage: str) -> None:
        self._key = stage.replace("@", "-")
        self._id: Any = None

    def __call__(self, share: float, line: str) -> None:
        """Report that `share` (0 to 1) of the work is done. An unreachable server does not stop the stage."""
        with suppress(Exception):
            if self._id is None:
                self._id = create_progress_artifact(100 * share, key=self._key, description=line)
            else:
                update_progress_artifact(self._id, 100 * share, description=line)


def show_result(root: Path) -> None:
    """Publish each target's variants as a table, and its result as a page with the plot."""
    found = {target: summary for target, summary in summaries(root).items() if summary.get("variants")}
    for target, summary in found.items():
        described, names = columns(summary), summary["variants"]
        rows = [{one_line(column.heading): one_line(column.cells[name]) for column in described} for name in names]
        create_table_artifact(key=f"variants-{target}", table=rows, description=f"all variants, for {target}")
        markdown = result(summary, _plot(root / "report/plots" / f"{target}.png"))
        create_markdown_artifact(key=f"result-{target}", markdown=markdown, description=f"the result, for {target}")


def show_run(root: Path, home: Path, tag: str, flow_run: str) -> None:
    """Publish the locations of a finished run in a workspace: tag, package, record in MLflow."""
    packages = {target: one["winner"] for target, one in summaries(root).items() if one.get("winner")}
    lines = [
        f"Kept as the tag `{tag}`. In a clone of the repository:",
        f"```\ngit checkout {tag} && dvc repro    # nothing to do: everything is in DVC's cache\n```",
    ]
    for target, package in packages.items():
        lines.append(f"The package for {target}, from `{package}`:\n```\nmodelpress get {tag} --target {target}\n```")
    pages, found = os.environ.get(MLFLOW_UI), find_run(home, flow_run)
    if pages and found:
        url = f"{pages}/#/experiments/{found[0]}/runs/{found[1]}"
        create_link_artifact(key="mlflow", link=url, link_text="this run in MLflow", description="the record")
        lines.append(f"[This run in MLflow]({url})")
    create_markdown_artifact(key="kept", markdown="\n\n".join(lines), description="where the run is kept")


def show_plan(plan: Plan) -> None:
    """Publish what a run would do with each stage, and why."""
    rows = [{"stage": s.name, "action": ACTIONS[s.state], "reason": "; ".join(s.reasons)} for s in plan.values()]
    create_table_artifact(key="plan", table=rows, description="what a run would do; nothing was done")


def _plot(path: Path) -> str:
    """The plot embedded in the text, so that the page needs no other server."""
    if not path.is_file():
        return ""
    return f"![quality over size](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"
