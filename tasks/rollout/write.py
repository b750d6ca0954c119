"""Write the files of a deployment. The same deployment gives the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.output import write_json, write_text
from tasks.rollout.compose import compose_files
from tasks.rollout.kubernetes import CURRENT, RETIRED, manifest_files
from tasks.rollout.record import RECORD, Deployment, Version, record


def write_deployment(folder: Path, deployment: Deployment) -> None:
    """Write the compose file or the manifests for the versions in `folder`, and the record last.

    The bundles must be there. TaskError, before anything is written, if they have no such files.
    """

    def bundle(version: Version) -> Path:
        return folder / version.folder

    of_form = {"compose": compose_files, "kubernetes": manifest_files}[deployment.place.form]
    files = of_form(deployment, bundle)
    for old in (CURRENT, RETIRED):
        shutil.rmtree(folder / old, ignore_errors=True)
    for name, text in files.items():
        write_text(folder / name, text)
    write_json(folder / RECORD, record(deployment))
