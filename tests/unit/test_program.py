"""What a stage's program says when something goes wrong."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from tasks.errors import TaskError
from tasks.program import run_stage
from tasks.settings import Settings

FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TaskError("found 3, expected 4"), "error: found 3, expected 4"),
        (FULL, "error: cannot write: No space left on device; free some space"),
        (
            OSError(errno.ENOSPC, "No space left on device", "models/x"),
            r"error: cannot write \(models/x\): No space left",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "models"),
            r"error: cannot write \(models\): Permission denied",
        ),
        (MemoryError(), "error: out of memory; lower"),
    ],
)
def test_what_a_person_can_mend_is_one_line(error: Exception, message: str) -> None:
    def work(settings: Settings) -> None:
        raise error

    with pytest.raises(SystemExit, match=message):
        run_stage(work)


@pytest.mark.parametrize("error", [ValueError("a defect"), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    def work(settings: Settings) -> None:
        raise error

    with pytest.raises(type(error)):
        run_stage(work)
