"""Bring the bundles of a deployment, write the files that serve them, and say what is there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from flows.errors import FlowError
from flows.server.ephemeral import quiet
from flows.tracking.fetch import fetch_package, run_tag
from flows.workspace.root import find_root
from tasks.bundle.checksums import check_sums
from tasks.errors import TaskError
from tasks.rollout.bundles import chosen_images, needed_images, read_images, served_name
from tasks.rollout.kubernetes import steps
from tasks.rollout.record import Deployment, Place, Version, read_record
from tasks.rollout.write import write_deployment

_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


def change(
    to: Path, which: tuple[str, str | None] | None, images: Sequence[str], canary: int | None, place: Place
) -> list[str]:
    """Bring a version and write the files of the deployment in `to`; return what is there now, in lines.

    which: run/NAME or champion, and the bundle's target; None: go back to the version before. images: NAME=IMAGE.
    canary: percent of the requests for this version; None: all. FlowError if any of that cannot be done.
    """
    try:
        chosen = read_images(images)
        current = read_record(to)
        if current and which and place.form != current.place.form:
            raise FlowError(f"{to} is for {current.place.form}, not {place.form}; name another folder with --to")
        if which is None:
            if current is None:
                raise FlowError(f"{to} has no deployment to go back in; expected a folder with deployment.json")
            new = current.back()
            check_sums(to / new.stable.folder)
        else:
            root = find_root()
            quiet(root)
            new = _with(root, to, current, which, chosen, canary, place)
        write_deployment(to, new)
    except TaskError as error:
        raise FlowError(str(error)) from error
    return _lines(to, new)


def place_of(kubernetes: bool, gateway: str | None, hostname: str | None, monitoring: str) -> Place:
    """Where it is deployed, by the options of the command; FlowError if they do not fit together."""
    if not kubernetes:
        if gateway or hostname:
            raise FlowError("--gateway and --hostname are for Kubernetes; add --kubernetes, or leave them out")
        return Place("compose")
    return Place("kubernetes", gateway, hostname, monitoring)


def _with(
    root: Path,
    to: Path,
    current: Deployment | None,
    which: tuple[str, str | None],
    images: dict[str, str],
    canary: int | None,
    place: Place,
) -> Deployment:
    """The deployment with the version and target `which`, whose bundle is then there."""
    tag = run_tag(root, *which)
    if current is None and canary is not None:
        raise FlowError(f"nothing is deployed in {to} yet to share requests with; leave out --canary")
    if place.form == "kubernetes":
        place = _completed(place, current)
    version = Version(tag, 100, {})
    bundle = to / version.folder
    _bring(root, tag, bundle, which[1])
    served = served_name(bundle, place.form)
    if current and served != current.served:
        raise FlowError(f"{tag} is served as {served}, but {to} serves {current.served}; name another folder with --to")
    before = current.stable.images if current else {}
    if current and (known := current.known.get(tag)):
        before = known.images
    chosen = chosen_images(images, before, needed_images(bundle, place.form))
    if current is None:
        return Deployment(served, place, (Version(tag, 100, chosen),))
    changed = current.all_to(tag, chosen) if canary is None else current.try_out(tag, chosen, canary)
    return changed.at(place)


def _completed(place: Place, current: Deployment | None) -> Place:
    """The place with the gateway and host name of before where none is given."""
    old = current.place if current else place
    gateway, hostname = place.gateway or old.gateway, place.hostname or old.hostname
    if not gateway or not hostname:
        raise FlowError("a route needs a Gateway and a host name; add --gateway NAME and --hostname HOST")
    if not _HOST.fullmatch(hostname):
        raise FlowError(f"--hostname is {hostname!r}, expected a name such as models.example.org")
    return Place(place.form, gateway, hostname, place.monitoring)


def _bring(root: Path, tag: str, bundle: Path, target: str | None) -> None:
    """Fetch a run's bundle for `target`, unless it is there. FlowError if its files do not match their checksums."""
    if bundle.exists():
        check_sums(bundle)
        return
    bundle.parent.mkdir(parents=True, exist_ok=True)
    part = bundle.with_name(f".{bundle.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an interrupted command
    try:
        fetch_package(root, tag, part, target)
        part.rename(bundle)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _lines(to: Path, deployment: Deployment) -> list[str]:
    """What is there now, and the commands to go on with."""
    shares = ", ".join(f"{version.run} {version.weight}%" for version in deployment.versions)
    lines = [f"{'requests':<8} {shares}"]
    if deployment.place.form == "compose":
        lines.append(f"{'next':<8} cd {to} && docker compose up --detach --wait --remove-orphans")
    else:
        commands = steps(to, deployment, lambda version: to / version.folder)
        lines += [f"{'then' if number else 'next':<8} {command}" for number, command in enumerate(commands)]
    if deployment.previous:
        lines.append(f"{'undo':<8} modelpress deploy --back --to {to}    # {deployment.previous.run}")
    return lines
