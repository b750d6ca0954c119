from __future__ import annotations

import os
import sys

import pytest

from flows.processes.run_module import error_line, stage_environment


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (
            ["error: group_size 7 does not divide 576", "ERROR: failed to reproduce 'x'"],
            "group_size 7 does not divide 576",
        ),
        (["Traceback", "ValueError: no", "ERROR: failed to reproduce 'x': exited with 1"], "ValueError: no"),
        (["Running stage 'x':", "ERROR: failed to reproduce 'x'"], "failed to reproduce 'x'"),
        (["Running stage 'x':", "Updating lock file 'dvc.lock'"], "ended with status 3 and without output"),
        ([], "ended with status 3 and without output"),
    ],
)
def test_the_error_line_is_found(lines: list[str], word: str) -> None:
    assert error_line(lines, 3) == word


def test_a_stage_finds_this_python_first() -> None:
    env = stage_environment({"PATH": "/elsewhere", "HF_TOKEN": "kept"})
    assert env["PATH"] == f"{os.path.dirname(sys.executable)}{os.pathsep}/elsewhere"
    assert env["PYTHONUNBUFFERED"] == "1"
    assert env["HF_TOKEN"] == "kept"


def test_threads_are_set_unless_the_user_has_set_them() -> None:
    assert stage_environment({}, 3)["OMP_NUM_THREADS"] == "3"
    assert stage_environment({"OMP_NUM_THREADS": "8"}, 3)["OMP_NUM_THREADS"] == "8"
