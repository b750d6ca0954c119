"""Idle workers of a cluster help a stage that shares its work: the quantization of a large model.

The stage and its helpers see the same folder, where each takes a share of a layer that nobody has begun
(tasks/quantizers/together.py). A helper whose worker is needed for another stage is called back: it ends after its
share.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import TaskRunner

from flows.errors import FlowError
from flows.execution.heartbeat import gone
from flows.execution.log_lines import Lines
from flows.processes.process import Process, Stopped
from flows.processes.run_module import error_line, stage_environment
from tasks.settings import Settings

FOLDER = Path(".modelpress/assist")
AFTER_ENV = "MODELPRESS_ASSIST_AFTER"
AFTER = 30.0  # seconds that a stage runs before it is helped: a small model is quantized before a helper has started


@task(name="assist", task_run_name="assist {stage}", persist_result=False, cache_policy=NO_CACHE)
def assist_task(root: str, stage: str, until: str, threads: int | None, pulse: str) -> str:
    """Help `stage`, no longer than the file `until` exists. An error is only logged: the stage does the work itself."""
    log = get_run_logger()
    command = [sys.executable, "-m", "tasks.quantizers.assist", stage.partition("@")[2], until]
    stopped, lines, said = gone(Path(pulse)), Lines(), [""]
    try:
        with Process(command, Path(root), stage_environment(os.environ, threads)) as process:
            for chunk in process.chunks():
                if stopped():
                    return "stopped"
                said += lines.feed(chunk)
            said += lines.close()
            status = process.wait()
    except (Stopped, FlowError) as error:
        return f"stopped {error}".strip()
    finally:
        Path(until).unlink(missing_ok=True)
    if status:
        log.warning("%s did without help: %s", stage, error_line(said, status))
    elif said[-1]:
        log.info("%s", said[-1])
    return said[-1]


class Assistants:
    """The helpers of a run. ended: called with a helper's name when it has ended; jobs: stages, with helpers, at a
    time; threads: of a helper, None: its worker's own setting; pulse: the flow's heartbeat file."""

    def __init__(
        self,
        root: Path,
        settings: Settings,
        runner: TaskRunner[Any],
        ended: Callable[[str], None],
        jobs: int,
        threads: int | None,
        pulse: Path,
    ) -> None:
        self._root, self._settings, self._runner, self._ended = root, settings, runner, ended
        self._jobs, self._threads, self._pulse = jobs, threads, pulse
        self._files: dict[str, tuple[str, Path]] = {}  # by helper, its stage and the file that keeps it at work
        self._sent = 0
        shutil.rmtree(root / FOLDER, ignore_errors=True)  # of a run that was killed

    def send(self, running: Mapping[str, float]) -> float | None:
        """Send idle workers to stages that share their work, call back those whose workers are needed. running: when
        each stage began, by time.monotonic(). Returns the seconds after which to call this again; None: not before a
        stage or a helper ends."""
        for stage, until in self._files.values():
            if stage not in running:  # the stage may have ended before its helper was ready
                until.unlink(missing_ok=True)
        called_back = len(running) + len(self._files) - self._jobs
        for name in list(self._files)[: max(called_back, 0)]:
            self._files[name][1].unlink(missing_ok=True)
        if called_back >= 0:
            return None
        waits = {stage: began + after() - time.monotonic() for stage, began in running.items() if self._shares(stage)}
        for _ in range(-called_back):
            ready = [stage for stage, wait in waits.items() if wait <= 0]
            if not ready:
                break
            self._send_to(min(ready, key=self._helpers))
        return min((wait for wait in waits.values() if wait > 0), default=None)

    def done(self, name: str) -> bool:
        """Whether `name` is a helper, which has ended."""
        return self._files.pop(name, None) is not None

    def _send_to(self, stage: str) -> None:
        self._sent += 1
        name = f"assist {self._sent}"
        until = self._root / FOLDER / f"{stage}-{self._sent}"
        until.parent.mkdir(parents=True, exist_ok=True)
        until.touch()
        self._files[name] = stage, until
        future = self._runner.submit(
            assist_task,
            {
                "root": str(self._root),
                "stage": stage,
                "until": str(until),
                "threads": self._threads,
                "pulse": str(self._pulse),
            },
        )
        future.add_done_callback(lambda _: self._ended(name))

    def _helpers(self, stage: str) -> int:
        return sum(own == stage for own, _ in self._files.values())

    def _shares(self, stage: str) -> bool:
        kind, _, variant = stage.partition("@")
        return kind == "quantize" and self._settings.variant(variant).has_shares


def after() -> float:
    """Seconds that a stage runs before it is helped."""
    value = os.environ.get(AFTER_ENV) or str(AFTER)
    try:
        return float(value)
    except ValueError:
        raise FlowError(f"{AFTER_ENV} is {value}; expected a number of seconds") from None
