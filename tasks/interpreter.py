"""Programs that run in a Python environment of their own, because their libraries do not fit beside ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interpreter:
    """Such a program. The module that starts it declares it once, as a constant.

    entry: the program's module, "tasks.…". lock: the file with the exact versions of its environment, from the
    project's folder. `make deps` makes both, and all that the program imports, dependencies of every stage that imports
    the declaring module; it reads them off the source, so they must be plain strings, given by name.
    """

    entry: str
    lock: str
