"""Error messages and exit statuses of a stage's program."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from tasks.errors import MEMORY_STATUS, TRANSIENT_STATUS, TaskError, TransientError
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
    ],
)
def test_user_error_is_one_line(error: Exception, message: str) -> None:
    def work(settings: Settings) -> None:
        raise error

    with pytest.raises(SystemExit, match=message):
        run_stage(work)


TORCH = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (TransientError("the hub is away"), TRANSIENT_STATUS, "error: the hub is away\n"),
        (MemoryError(), MEMORY_STATUS, "error: out of memory; lower"),
        (RuntimeError(TORCH), MEMORY_STATUS, "error: out of memory; lower"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), MEMORY_STATUS, "error: out of memory; lower"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), MEMORY_STATUS, "error: out of GPU memory; lower"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MEMORY_STATUS, "error: out of memory; lower"),
    ],
)
def test_transient_and_memory_errors_have_their_own_status(
    error: Exception, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(settings: Settings) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_stage(work)
    assert ended.value.code == status
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("error", [ValueError("a defect"), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_unexpected_error_keeps_its_traceback(error: Exception) -> None:
    def work(settings: Settings) -> None:
        raise error

    with pytest.raises(type(error)):
        run_stage(work)


# few rows and long sums, as in a wide model's activations: by default MKL splits the sums among its threads
_PRODUCTS = """
import hashlib, torch
from tasks.program import run_stage

def work(settings):
    random = torch.Generator().manual_seed(0)
    found = hashlib.sha256()
    for rows, width, channels in [(512, 5632, 2048), (64, 8192, 512), (32, 11264, 32)]:
        x, weight = (torch.randn(size, width, generator=random) for size in (rows, channels))
        found.update((x @ weight.T).numpy().tobytes())
    print(torch.get_num_threads(), found.hexdigest())

run_stage(work)
"""


def test_matrix_products_do_not_depend_on_the_number_of_threads() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    found = dict(
        subprocess.run(
            [sys.executable, "-c", _PRODUCTS],
            env={**environment, "OMP_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for threads in ("1", "2")
    )
    assert found.keys() == {"1", "2"}
    assert len(set(found.values())) == 1
