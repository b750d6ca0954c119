"""The addresses of a checkout's running server. Does not import Prefect, whose environment depends on them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from flows.errors import FlowError

STATE = Path(".modelpress/serve.json")  # contains the addresses; locked while a server runs


@dataclass(frozen=True)
class Addresses:
    """The addresses of the web UIs of Prefect and MLflow."""

    prefect: str
    mlflow: str

    @property
    def api(self) -> str:
        """The address of Prefect's API."""
        return f"{self.prefect}/api"


def at_work(root: Path) -> Addresses | None:
    """The addresses of the server running in `root`; None if there is none."""
    path = root / STATE
    try:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                file.seek(0)
                return Addresses(**json.loads(file.read()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def announced(root: Path, addresses: Addresses) -> Iterator[None]:
    """Hold the lock and publish the addresses while the body runs; FlowError if another server is running."""
    path = root / STATE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FlowError(f"another `modelpress serve` is starting in {root}; wait for it") from error
        file.truncate(0)
        file.write(json.dumps(asdict(addresses)))
        file.flush()
        yield
