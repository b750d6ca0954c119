"""Arrows point one way: flows -> (a process boundary) -> tasks, and tasks.settings is what both sides read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "llmcompressor", "compressed_tensors", "awq", "lm_eval", "datasets", "gguf"}
CONDUCTORS = {"prefect", "dvc", "mlflow", "flows"}
# pure modules without a model library
SHARED = {
    *(
        "tasks.settings",
        "tasks.errors",
        "tasks.old_words",
        "tasks.reporting.verdict",
        "tasks.scoring.eval_tasks",
        "tasks.reporting.number_format",
    ),
    *("tasks.planning.estimate", "tasks.planning.machine", "tasks.planning.shape"),
}


def _imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def _files(folder: str) -> list[Path]:
    return sorted((PROJECT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", _files("flows"), ids=lambda path: path.name)
def test_flows_import_no_model_library_and_of_tasks_only_what_is_shared(path: Path) -> None:
    names = _imports(path)
    assert not {name for name in names if name.partition(".")[0] in HEAVY}
    assert {name for name in names if name.partition(".")[0] == "tasks"} <= SHARED


@pytest.mark.parametrize("path", _files("tasks"), ids=lambda path: path.name)
def test_tasks_import_no_conductor(path: Path) -> None:
    assert not {name for name in _imports(path) if name.partition(".")[0] in CONDUCTORS}


def test_only_the_plan_and_the_overrides_read_dvc_from_inside() -> None:
    readers = {path.name for path in _files("flows") if any(n.partition(".")[0] == "dvc" for n in _imports(path))}
    assert readers == {"plan.py", "overrides.py"}


def test_the_flow_loads_no_model_library_by_way_of_others() -> None:
    ours = "flows.optimize, flows.press, flows.doctor.examine, flows.cli"
    code = f"import {ours}, sys; sys.exit(', '.join({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""


def test_the_command_line_answers_without_the_libraries_that_take_seconds() -> None:
    slow = {"prefect", "mlflow", "dvc"}
    code = f"import flows.cli, sys; sys.exit(', '.join({slow!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""
