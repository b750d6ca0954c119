"""Files that the code finds by path exist, and a missing one is a clear error."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from flows.errors import FlowError
from flows.graph import preflight
from flows.graph.preflight import check_settings_work
from flows.processes import process
from flows.server import console_log
from tasks import output
from tasks.checks import smoke
from tasks.errors import TaskError
from tasks.reporting import render

PROJECT = Path(__file__).resolve().parents[2]


class TestPreflight:
    def test_a_checkout_without_it_is_refused(self, tmp_path: Path) -> None:
        error = r"has no tasks/checks/preflight\.py, which checks the settings .*: git checkout -- tasks/checks"
        with pytest.raises(FlowError, match=error):
            check_settings_work(tmp_path, downloaded=False)

    @pytest.mark.parametrize("downloaded", [True, False])
    def test_the_one_of_the_checkout_is_asked(self, tmp_path: Path, downloaded: bool) -> None:
        program = tmp_path / preflight.FILE
        program.parent.mkdir(parents=True)
        for package in (program.parent, program.parent.parent):
            (package / "__init__.py").touch()
        program.write_text("import sys\nsys.exit(f'error: refuses {len(sys.argv)}, {sys.argv[-1]}')\n")
        reason = r"^refuses 2, models/source$" if downloaded else r"^refuses 1, .*/preflight\.py$"
        with pytest.raises(FlowError, match=reason):
            check_settings_work(tmp_path, downloaded)
        program.write_text("")
        check_settings_work(tmp_path, downloaded)

    def test_it_is_the_program_of_the_project(self) -> None:
        assert preflight.PROGRAM.replace(".", "/") + ".py" == str(preflight.FILE)
        assert (PROJECT / preflight.FILE).is_file()


def test_the_smoke_check_runs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (smoke.ROOT / smoke.FILE).samefile(smoke.__file__)
    monkeypatch.setattr(smoke, "ROOT", tmp_path)
    with pytest.raises(TaskError, match=r"has no tasks/checks/smoke\.py, .*; nothing is packaged"):
        smoke.generates(tmp_path, "transformers", "float32")


def test_a_template_is_found_beside_its_renderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = {path.name for path in (PROJECT / "tasks/reporting/templates").iterdir()}
    assert {path.name for path in render.TEMPLATES.iterdir()} == used
    with pytest.raises(TaskError, match=r"gone\.j2 not found in .*templates; reinstall the project"):
        render.render("gone.j2", escape=False)


def test_a_command_without_its_guard_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (PROJECT / "flows/processes/guard.py").samefile(process.GUARD)
    monkeypatch.setattr(process, "GUARD", tmp_path / "guard.py")
    with pytest.raises(FlowError, match=r"guard\.py is missing, .*; reinstall modelpress"):
        process.Process([sys.executable, "-c", "open('started', 'w')"], tmp_path, dict(os.environ))
    assert not (tmp_path / "started").exists()


def test_resuming_requires_comparable_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert output.CODE.samefile(PROJECT / "tasks")
    monkeypatch.setattr(output, "CODE", tmp_path)
    with pytest.raises(TaskError, match="holds no Python files"), output.resumable_directory(tmp_path / "out", "key"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_form_is_that_of_this_folder_else_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    form = PROJECT / "flows/form.py"
    assert runpy.run_path(str(form))["ROOT"] == PROJECT
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    assert runpy.run_path(str(form))["ROOT"] == tmp_path
    (tmp_path / "params.yaml").unlink()
    (tmp_path / "flows").mkdir()
    shutil.copy(form, tmp_path / "flows")
    with pytest.raises(FlowError, match=r"params\.yaml not found"):
        runpy.run_path(str(tmp_path / "flows/form.py"))


def test_log_lines_of_ours_are_told_by_the_folder_of_the_flows() -> None:
    assert console_log.OURS.samefile(PROJECT / "flows")
