"""The registry of packages in MLflow: a version for each, and the alias `champion` on the best.

A version points to the package in DVC's cache by path, checksum and the run's tag; no bytes are copied.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.errors import FlowError
from flows.graph.dvc_lock import lock_hash, lock_stages
from flows.graph.params_file import read_settings
from flows.tracking.champion import fetch_contender, read_contender, why_not
from flows.tracking.mlflow_run import GIT_TAG, Log, find_run, open_store, run_with_result, store_error, tracking_uri
from flows.tracking.run_facts import summaries

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
STAGE = "package"


@dataclass(frozen=True)
class Package:
    """A package of a finished run: its name, target, variant and location."""

    name: str
    target: str
    variant: str
    path: str
    md5: str
    tag: str
    commit: str


def register(root: Path, home: Path, tag: str, commit: str, flow_run: str, log: Log) -> None:
    """Register the package of the run in `root`, tagged `tag`, and make it the champion if it is better.

    The same bytes are not registered twice. A failure is logged and does not fail the run.
    """
    try:
        with _one_at_a_time(home), _default_store(home):
            _register(root, home, tag, commit, flow_run, log)
    except Exception as error:
        log.warning("%s; the run is kept as %s, but its package is not registered", store_error(home, error), tag)


def champion_tag(home: Path, name: str) -> str:
    """The run tag of the champion among the packages named `name`; FlowError if there is none."""
    try:
        client, _ = open_store(home)
        version = _champion(client, name)
    except Exception as error:
        raise FlowError(f"{store_error(home, error)}; name a run instead: `modelpress runs` lists them") from error
    if version is None:
        raise FlowError(f"no {CHAMPION} of {name} yet; a deployed run makes one: `modelpress serve`")
    return str(version.tags[GIT_TAG])


def _register(root: Path, home: Path, tag: str, commit: str, flow_run: str, log: Log) -> None:
    client, experiment = open_store(home)
    run = find_run(home, flow_run) or run_with_result(home, lock_hash(root, lock_stages(root)))
    if run:
        client.set_tag(run[1], GIT_TAG, tag)
    for package in _packages(root, tag, commit):
        _register_one(root, home, client, (experiment, run[1] if run else None), package, log)


def _register_one(
    root: Path, home: Path, client: MlflowClient, run: tuple[str, str | None], package: Package, log: Log
) -> None:
    """run: the ids of MLflow's experiment and of the run that made the package."""
    version = _same(client, package)
    if version:
        log.info("MLflow: the same package is already version %s of %s", version.version, package.name)
    else:
        version = _new_version(client, *run, package, _figures(root, package))
        log.info("MLflow: registered as version %s of %s", version.version, package.name)
    champion = _champion(client, package.name)
    if champion is not None and str(champion.version) == str(version.version):
        return
    reason = _objection(root, home, champion, package) if champion is not None else None
    if reason is None:
        client.set_registered_model_alias(package.name, CHAMPION, version.version)
        log.info("%s: version %s is now the %s", package.name, version.version, CHAMPION)
    else:
        assert champion is not None
        log.info(
            "%s: version %s (%s) stays the %s; the new package: %s; to override this, move the alias in MLflow's UI",
            package.name,
            champion.version,
            champion.tags.get(GIT_TAG),
            CHAMPION,
            reason,
        )


def _packages(root: Path, tag: str, commit: str) -> Iterator[Package]:
    """The run's packages from dvc.lock, one for each target."""
    stages = lock_stages(root)
    for target, summary in summaries(root).items():
        outs = stages.get(f"{STAGE}@{target}", {}).get("outs", [])
        if outs and (winner := summary.get("winner")):
            path = str(outs[0]["path"])
            yield Package(Path(path).name, target, str(winner), path, str(outs[0]["md5"]), tag, commit)


def _figures(root: Path, package: Package) -> dict[str, str]:
    """The report's figures of the packaged variant, as tags of the version."""
    row = summaries(root)[package.target]["variants"][package.variant]
    retention = row.get("retention") or {}
    values = {"size_bytes": row.get("size_bytes"), "identity": row.get("identity"), "verdict": row.get("reason")}
    values |= {f"retention.{key}": retention.get(key) for key in ("mean", "low", "high")}
    return {key: str(value)[:5000] for key, value in values.items() if value is not None}


def _same(client: MlflowClient, package: Package) -> ModelVersion | None:
    """The version with the same bytes."""
    found = client.search_model_versions(f"name = '{package.name}' and tag.`dvc.md5` = '{package.md5}'")
    return found[0] if found else None


def _new_version(
    client: MlflowClient, experiment: str, run: str | None, package: Package, figures: dict[str, str]
) -> ModelVersion:
    import mlflow
    from mlflow.exceptions import MlflowException

    tags = {
        "dvc.path": package.path,
        "dvc.md5": package.md5,
        GIT_TAG: package.tag,
        "git.commit": package.commit,
        "target": package.target,
        "variant": package.variant,
        **figures,
    }
    model = mlflow.create_external_model(package.name, source_run_id=run, tags=tags, experiment_id=experiment)
    try:
        client.create_registered_model(package.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # like mlflow.register_model, without its output on stderr
    source = f"models:/{model.model_id}"
    return client.create_model_version(package.name, source, run_id=run, tags=tags, model_id=model.model_id)


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        number = client.get_registered_model(name).aliases.get(CHAMPION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return client.get_model_version(name, str(number)) if number else None


def _objection(root: Path, home: Path, champion: ModelVersion, package: Package) -> str | None:
    """The reason why the package does not become the champion; None if it does."""
    share = summaries(root)[package.target]["variants"][package.variant]["gate"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            of = champion.tags["target"], champion.tags["variant"]
            other = fetch_contender(home, champion.tags[GIT_TAG], *of, Path(folder))
            new = read_contender(root, package.target, package.variant)
            return why_not(other, new, read_settings(root / "params.yaml").gate, float(share))
    except (FlowError, KeyError, ValueError, OSError) as error:
        return f"the two cannot be compared: {error}"


@contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    """Lock, so that two runs that end together do not both find no champion."""
    path = home / ".modelpress/registry.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _default_store(home: Path) -> Iterator[None]:
    """Make `home`'s store the default: MLflow's registry always looks for models in the default store."""
    name = "MLFLOW_TRACKING_URI"
    before: Any = os.environ.get(name)
    os.environ[name] = tracking_uri(home)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
