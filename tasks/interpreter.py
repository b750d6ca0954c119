"""Programs that run in a separate Python environment, because their libraries conflict with ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interpreter:
    """A program with its own environment. The module that starts it declares it once, as a constant.

    entry: the program's module, "tasks.…". lock: the lock file of its environment, relative to the project's folder.
    `make deps` adds both, and everything the program imports, to the dependencies of every stage that imports the
    declaring module. It parses the source, so both must be string literals passed as keywords.
    """

    entry: str
    lock: str
