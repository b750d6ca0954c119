"""The shared body of every stage's `main()`: read the settings, run, report an error in one clear line."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tasks.determinism import set_environment
from tasks.errors import MEMORY_STATUS, TRANSIENT_STATUS, TaskError, TransientError
from tasks.settings import Settings, load_settings

PARAMS = Path("params.yaml")
_DISK_ADVICE = "free some space or fix the permissions, then run again"
# messages of torch, and of the system through other libraries; torch has an exception type only for GPU memory
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory")
_MEMORY_ADVICE = "lower calibration.samples or evaluation.batch_tokens, or use a larger machine"


def run_stage(work: Callable[[Settings], object]) -> None:
    """Run `work` with the settings of ./params.yaml, under `one_line_errors`."""
    set_environment()
    with one_line_errors():
        work(load_settings(PARAMS))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit 1 with one clear line on an error that the user can fix.

    Exit with TRANSIENT_STATUS where a retry may help, with MEMORY_STATUS when memory ran out. An unexpected error
    keeps its traceback: it is a bug.
    """
    try:
        yield
    except TransientError as error:
        _end(TRANSIENT_STATUS, str(error))
    except TaskError as error:
        sys.exit(f"error: {error}")
    except MemoryError:
        _end(MEMORY_STATUS, f"out of memory; {_MEMORY_ADVICE}")
    except OSError as error:
        if error.errno == errno.ENOMEM:
            _end(MEMORY_STATUS, f"out of memory; {_MEMORY_ADVICE}")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(f"error: cannot write{where}: {error.strerror}; {_DISK_ADVICE}")
    except Exception as error:
        if isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)):
            _end(MEMORY_STATUS, f"out of {'GPU ' if 'CUDA' in str(error) else ''}memory; {_MEMORY_ADVICE}")
        # safetensors wraps the OSError as text in an exception of its own
        if f"(os error {errno.ENOSPC})" not in str(error):
            raise
        sys.exit(f"error: cannot write: {os.strerror(errno.ENOSPC)}; {_DISK_ADVICE}")


def _end(status: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def arguments(usage: str) -> list[str]:
    """Return the stage's command-line arguments: one for each word in capitals at the end of `usage`."""
    given, expected = sys.argv[1:], [word for word in usage.split() if word.isupper()]
    if len(given) != len(expected) or any(one.startswith("-") for one in given):
        sys.exit(f"usage: {usage}")
    return given
