"""deployment.json: which versions a folder serves, with which shares of the requests; and how that changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tasks.errors import TaskError

RECORD = "deployment.json"
VERSIONS = "versions"  # the bundles
Form = Literal["compose", "kubernetes"]


@dataclass(frozen=True)
class Version:
    """A finished run. weight: percent of the requests. images: by name, with their digests. slot: 0 or 1, the set of
    GPUs that it takes where two versions share a machine."""

    run: str
    weight: int
    images: Mapping[str, str]
    slot: int = 0

    @property
    def name(self) -> str:
        """The run's name, which is part of the names of files, services and objects."""
        return self.run.removeprefix("run/")

    @property
    def folder(self) -> str:
        """The bundle's folder, relative to the deployment's."""
        return f"{VERSIONS}/{self.name}"


@dataclass(frozen=True)
class Place:
    """Where the files are for: the form; and for Kubernetes the Gateway (NAME or NAMESPACE/NAME), the host name of the
    clients' address, and Prometheus' namespace."""

    form: Form
    gateway: str | None = None
    hostname: str | None = None
    monitoring: str | None = None


@dataclass(frozen=True)
class Deployment:
    """served: the model's name for clients. versions: one, or a second one that is tried with its share of the
    requests. previous: what `back` returns to. retired: what the last change took out."""

    served: str
    place: Place
    versions: tuple[Version, ...]
    previous: Version | None = None
    retired: tuple[Version, ...] = ()

    @property
    def stable(self) -> Version:
        """The version that is not on trial."""
        return self.versions[0]

    @property
    def known(self) -> dict[str, Version]:
        """All versions of the record by run."""
        other = [*self.retired, *([self.previous] if self.previous else []), *self.versions]
        return {version.run: version for version in other}

    def all_to(self, run: str, images: Mapping[str, str]) -> Deployment:
        """Give the run all requests. It takes the GPUs of the version that it replaces, or keeps those of its trial."""
        here = next((version for version in self.versions if version.run == run), None)
        new = Version(run, 100, images, (here or self.stable).slot)
        if self.versions == (new,):
            return self
        previous: Version | None = replace(self.stable, weight=100)
        if run == self.stable.run:  # which ends a trial, or gets another image
            previous = self.previous if self.previous and self.previous.run != run else None
        return self._change((new,), previous)

    def try_out(self, run: str, images: Mapping[str, str], weight: int) -> Deployment:
        """Give the run `weight` percent of the requests. TaskError if it is the version that has the others."""
        if run == self.stable.run:
            raise TaskError(f"{run} is the version that has the other requests; name another one for --canary")
        stable = replace(self.stable, weight=100 - weight)
        versions = (stable, Version(run, weight, images, 1 - stable.slot))
        if self.versions == versions:
            return self
        return self._change(versions, replace(stable, weight=100))

    def back(self) -> Deployment:
        """Give all requests to the version before. TaskError if there is none."""
        if self.previous is None:
            raise TaskError(
                f"there is no version before {self.stable.run} to go back to; name one: modelpress deploy run/NAME"
            )
        return self._change((self.previous,), None)

    def at(self, place: Place) -> Deployment:
        """The same versions at another place."""
        return replace(self, place=place)

    def _change(self, versions: tuple[Version, ...], previous: Version | None) -> Deployment:
        kept = {version.run for version in versions}
        retired = tuple(version for version in self.versions if version.run not in kept)
        return replace(self, versions=versions, previous=previous, retired=retired)


def read_record(folder: Path) -> Deployment | None:
    """The deployment in a folder; None if it is new or empty. TaskError if it holds something else."""
    if not folder.exists():
        return None
    path = folder / RECORD
    if not folder.is_dir():
        raise TaskError(f"{folder} is a file; name a folder with --to")
    if not path.is_file():
        if other := sorted(entry.name for entry in folder.iterdir() if entry.name != VERSIONS):
            raise TaskError(
                f"{folder} holds {other[0]} and no {RECORD}, so it is no deployment; name another folder with --to"
            )
        return None
    try:
        return _deployment(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TaskError(
            f"{path} is not the record of a deployment ({type(error).__name__}: {error}); name another folder with --to"
        ) from error


def record(deployment: Deployment) -> dict[str, Any]:
    """The contents of deployment.json."""
    return asdict(deployment)


def _deployment(values: dict[str, Any]) -> Deployment:
    place = Place(**values["place"])
    versions = tuple(Version(**one) for one in values["versions"])
    if place.form not in get_args(Form) or not 1 <= len(versions) <= 2:
        raise ValueError(f"form is {place.form}, with {len(versions)} versions")
    return Deployment(
        served=str(values["served"]),
        place=place,
        versions=versions,
        previous=Version(**values["previous"]) if values["previous"] else None,
        retired=tuple(Version(**one) for one in values["retired"]),
    )
