"""Record runs in MLflow: one parent run per pipeline run, from its start, and one child run per variant.

The stages' files hold the results. If MLflow is unreachable, the pipeline run logs a warning and continues.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.graph import dvc_lock
from flows.graph.plan import Plan
from flows.tracking import run_facts
from flows.tracking.known_result import note_result

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "modelpress"
LOCK_TAG = "dvc.lock"
ERROR_TAG = "error"
GIT_TAG = "git.tag"  # only of deployed runs
PARENT_TAG = "mlflow.parentRunId"
CHECKOUT_TAG = "modelpress.checkout"
REPORT = Path("report")
WINNER_TAG = "winner."  # and the target

Log = Logger | LoggerAdapter[Any]


def tracking_uri(root: Path) -> str:
    """The URI of MLflow's store: MLFLOW_TRACKING_URI, else mlflow.db in `root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"


class Record:
    """The MLflow record of one pipeline run. Its first failure is logged and ends the recording, but not the run."""

    def __init__(self, root: Path, home: Path, plan: Plan, log: Log) -> None:
        self._root = root
        self._home = home
        self._plan = plan
        self._log = log
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._run: str | None = None

    def start(self, tags: Mapping[str, str]) -> None:
        """Open the store and start the parent run, unless there is nothing to do and the result is already recorded."""
        self._safely(lambda: self._start(dict(tags)))

    def complete(self, results: Mapping[str, str]) -> None:
        """Record the results, unless nothing was executed and a finished run has the same result."""
        if self._run:
            self._safely(lambda: self._complete(results))

    def results(self, results: Mapping[str, str]) -> None:
        """Record the results of a run that failed after its report, unless nothing was executed."""
        if self._run and "executed" in results.values():
            self._safely(lambda: self._results(results))

    def end(self, status: str, error: str) -> None:
        """End the parent run as FAILED or KILLED, with the reason."""
        if self._run:
            self._safely(lambda: self._end(status, error))

    def _start(self, tags: dict[str, str]) -> None:
        self._client, self._experiment = open_store(self._home)
        here = f"{socket.gethostname()}:{self._root}"
        # a checkout has one run at a time, so any other RUNNING record from here is of a killed run
        for run in self._search(f"tags.`{CHECKOUT_TAG}` = '{_quoted(here)}' and attributes.status = 'RUNNING'"):
            self._client.set_terminated(run.info.run_id, "KILLED")
        if all(stage.state == "unchanged" for stage in self._plan.values()) and self._same():
            return
        name = tags.pop("name")
        tags |= {CHECKOUT_TAG: here, "mlflow.source.name": "modelpress", **run_facts.git_tags(self._root)}
        with suppress(KeyError, OSError):
            tags["mlflow.user"] = getpass.getuser()
        self._run = self._client.create_run(self._experiment, tags=tags, run_name=name).info.run_id

    def _complete(self, results: Mapping[str, str]) -> None:
        if "executed" not in results.values() and self._same():
            self._store.delete_run(self._parent)
            self._run = None
            return
        self._results(results)
        # last, so that a run with this tag is complete
        lock = dvc_lock.lock_hash(self._root, self._plan)
        self._store.set_tag(self._parent, LOCK_TAG, lock)
        self._store.set_terminated(self._parent, "FINISHED")
        note_result(self._root, tracking_uri(self._home), lock, self._parent)
        self._log.info("MLflow: recorded in run %s", self._parent)

    def _results(self, results: Mapping[str, str]) -> None:
        run = self._parent
        settings = dvc_lock.params(self._root)
        settings.pop("variants", None)
        found = run_facts.summaries(self._root)
        tags = {f"{WINNER_TAG}{target}": str(one["winner"]) for target, one in found.items() if "winner" in one}
        executed = float(list(results.values()).count("executed"))
        self._write(run, run_facts.flatten(settings), {"stages": float(len(results)), "executed": executed}, tags)
        for path in ("params.yaml", "dvc.lock"):
            if (self._root / path).is_file():
                self._store.log_artifact(run, str(self._root / path))
        if (self._root / REPORT).is_dir():
            self._store.log_artifacts(run, str(self._root / REPORT))
        for variant in run_facts.variant_facts(self._root):
            self._child(variant)

    def _child(self, variant: run_facts.VariantFacts) -> None:
        tags = {PARENT_TAG: self._parent, "mlflow.source.name": "modelpress"}
        child = self._store.create_run(self._experiment, tags=tags, run_name=variant.name).info.run_id
        self._write(child, variant.params, variant.metrics, variant.tags)
        for stage, path in variant.files.items():
            self._store.log_artifact(child, str(path), stage)
        for path in (REPORT / "plots" / f"{variant.target}.png", REPORT / "index.html"):
            if (self._root / path).is_file():
                self._store.log_artifact(child, str(self._root / path))
        self._store.set_terminated(child, "FINISHED")

    def _end(self, status: str, error: str) -> None:
        self._store.set_tag(self._parent, ERROR_TAG, error[:5000])
        self._store.set_tag(self._parent, "mlflow.note.content", error[:5000])
        self._store.set_terminated(self._parent, status)

    def _same(self) -> bool:
        """Whether a finished run has the result of the current dvc.lock; log which."""
        lock = dvc_lock.lock_hash(self._root, self._plan)
        runs = self._search(f"tags.`{LOCK_TAG}` = '{lock}' and attributes.status = 'FINISHED'")
        for run in runs:
            note_result(self._root, tracking_uri(self._home), lock, run.info.run_id)
            self._log.info("MLflow: this result is already recorded in run %s", run.info.run_id)
            return True
        return False

    def _search(self, condition: str) -> Iterable[Any]:
        return list(self._store.search_runs([self._experiment], condition, max_results=10))

    def _write(
        self, run: str, params: Mapping[str, str], metrics: Mapping[str, float], tags: Mapping[str, str]
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        for some in _batches(params.items(), 100):
            self._store.log_batch(run, params=[Param(key, value[:6000]) for key, value in some])
        for figures in _batches(metrics.items(), 500):
            self._store.log_batch(run, metrics=[Metric(key, value, now, 0) for key, value in figures])
        for some in _batches(tags.items(), 100):
            self._store.log_batch(run, tags=[RunTag(key, value[:5000]) for key, value in some])

    @property
    def _store(self) -> MlflowClient:
        if self._client is None:
            raise RuntimeError("the MLflow store is not open")
        return self._client

    @property
    def _parent(self) -> str:
        if self._run is None:
            raise RuntimeError("no MLflow run was started")
        return self._run

    def _safely(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            self._log.warning("%s; the results are complete, but not recorded", store_error(self._home, error))


def find_run(home: Path, flow_run: str) -> tuple[str, str] | None:
    """The ids of the experiment and of the MLflow run that records a flow run (an id); None if there is none."""
    with suppress(Exception):
        client, experiment = open_store(home)
        for run in client.search_runs([experiment], f"tags.`prefect.flow_run_id` = '{_quoted(flow_run)}'"):
            return experiment, str(run.info.run_id)
    return None


def run_with_result(home: Path, lock: str) -> tuple[str, str] | None:
    """The ids of the experiment and of the finished run with this hash of dvc.lock; None if there is none."""
    client, experiment = open_store(home)
    for run in client.search_runs([experiment], f"tags.`{LOCK_TAG}` = '{lock}' and attributes.status = 'FINISHED'"):
        return experiment, str(run.info.run_id)
    return None


def store_error(home: Path, error: Exception) -> str:
    """The user message for a failure of MLflow."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"MLflow at {tracking_uri(home)} does not work ({reason[0]})"


@contextmanager
def recorded(root: Path, home: Path, plan: Plan, log: Log, tags: Mapping[str, str]) -> Iterator[Record]:
    """Record a parent run: RUNNING while the body runs, FAILED after an error, KILLED after an interrupt.

    root: the checkout with the results; home: the checkout with the store, unless MLFLOW_TRACKING_URI is set.
    """
    record = Record(root, home, plan, log)
    record.start(tags)
    try:
        yield record
    except Exception as error:
        record.end("FAILED", str(error) or type(error).__name__)
        raise
    except BaseException as interrupt:
        record.end("KILLED", f"interrupted ({type(interrupt).__name__})")
        raise


def open_store(root: Path) -> tuple[MlflowClient, str]:
    """The store of the checkout `root` and the id of the experiment, which is created if it is missing."""
    from mlflow import MlflowClient

    uri = tracking_uri(root)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    lock = root / ".modelpress/mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    # two processes that create the tables of a new SQLite file at once would break it permanently
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(name)
        if found is None:
            place = (root / "mlruns").as_uri() if uri.startswith("sqlite:") else None
            return client, client.create_experiment(name, artifact_location=place)
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return client, found.experiment_id


def _batches(items: Iterable[tuple[str, Any]], size: int) -> Iterator[list[tuple[str, Any]]]:
    rest = list(items)
    for start in range(0, len(rest), size):
        yield rest[start : start + size]


def _quoted(text: str) -> str:
    return text.replace("'", "")
