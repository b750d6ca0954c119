"""What every stage's `main()` shares: read the settings, run, and turn what went wrong into one clear line."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tasks.determinism import set_environment
from tasks.errors import MEMORY_STATUS, TRANSIENT_STATUS, TaskError, TransientError
from tasks.settings import Settings, load_settings

PARAMS = Path("params.yaml")
_MEND = "free some space or mend the permissions, then run again"
# what torch says, and the system by way of others; torch has a type for a GPU's memory alone
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory")
_LESS = "lower calibration.samples or evaluation.batch_tokens, or use a larger machine"


def run_stage(work: Callable[[Settings], object]) -> None:
    """Run `work` with the settings of ./params.yaml; exit 1 with one clear line where a person can mend it.

    Two statuses are told apart from that: TRANSIENT_STATUS where trying again may help, MEMORY_STATUS where memory
    ran out.
    An error that nobody foresaw keeps its traceback: it is a defect, and the traceback is its description.
    """
    set_environment()
    try:
        work(load_settings(PARAMS))
    except TransientError as error:
        _end(TRANSIENT_STATUS, str(error))
    except TaskError as error:
        sys.exit(f"error: {error}")
    except MemoryError:
        _end(MEMORY_STATUS, f"out of memory; {_LESS}")
    except OSError as error:
        if error.errno == errno.ENOMEM:
            _end(MEMORY_STATUS, f"out of memory; {_LESS}")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(f"error: cannot write{where}: {error.strerror}; {_MEND}")
    except Exception as error:
        if isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)):
            _end(MEMORY_STATUS, f"out of {'GPU ' if 'CUDA' in str(error) else ''}memory; {_LESS}")
        # safetensors wraps the system's error in one of its own, as text
        if f"(os error {errno.ENOSPC})" not in str(error):
            raise
        sys.exit(f"error: cannot write: {os.strerror(errno.ENOSPC)}; {_MEND}")


def _end(status: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def one_argument(usage: str) -> str:
    """The stage's only command-line argument, the name of a variant."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: {usage}")
    return sys.argv[1]
