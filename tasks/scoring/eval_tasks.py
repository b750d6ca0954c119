"""The available evaluation tasks: those in evals/ and those of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import TaskError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def local_tasks(evals: Path) -> list[str]:
    """Names of the task definitions in `evals`: their file names."""
    return sorted(path.stem for path in evals.glob("*.yaml"))


def check_tasks(tasks: list[str], evals: Path) -> None:
    """TaskError if a task is defined neither in `evals` nor in lm-eval."""
    if not set(tasks) <= set(local_tasks(evals)):  # a lookup takes seconds
        task_manager(tasks, evals)


def task_manager(tasks: list[str], evals: Path) -> TaskManager:
    """lm-eval's task registry, extended by `evals`; TaskError if one of `tasks` is not in it."""
    from lm_eval.tasks import TaskManager

    local = local_tasks(evals)
    manager = TaskManager(include_path=str(evals), include_defaults=not set(tasks) <= set(local))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise TaskError(
            f"evaluation.tasks names {', '.join(unknown)}, which neither {evals}/ nor lm-eval defines; "
            f"available without a hub: {', '.join(local)}"
        )
    return manager
