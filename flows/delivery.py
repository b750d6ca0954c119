"""The commands for a finished bundle. Each runs as a process, `python -m tasks.bundle`, in the user's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.errors import FlowError
from flows.graph.dvc_lock import lock_stages
from flows.processes.run_module import stage_environment

PROGRAM = "tasks.bundle"

Bundle = Annotated[str, typer.Argument(help="A bundle's folder, an OCI image layout of one, or oci://HOST/NAME:TAG.")]
Folder = Annotated[Path, typer.Argument(help="A bundle's folder.", metavar="DIR")]
Address = Annotated[str, typer.Argument(help="oci://HOST/NAME:TAG", metavar="ADDRESS")]
Key = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The expected signer's public key (PEM). Else no signature is checked."),
]
Identity = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The expected signer of a keyless signature, such as an e-mail address."),
]
Issuer = Annotated[str | None, typer.Option(metavar="URL", help="The login service that confirmed the identity.")]


def verify(bundle: Bundle, key: Key = None, identity: Identity = None, issuer: Issuer = None) -> None:
    """Check every byte of a bundle and, if a signer is named, its signature. The exit status is 0 only if all holds.

    Examples:

        modelpress verify dist/smollm2-135m-instruct

        modelpress verify oci://registry.example.org/models/smollm2:1 --key publisher.pem

        modelpress verify smollm2 --identity ci@example.org --issuer https://accounts.example.org
    """
    _run("verify", bundle, *_signer(key, identity, issuer))


def sign(
    bundle: Folder,
    keyless: Annotated[
        bool, typer.Option("--keyless", help="Sign by Sigstore, as the CI job or after a login in the browser.")
    ] = False,
) -> None:
    """Sign a bundle: write model.sig. The private key is the file that MODELPRESS_SIGNING_KEY names.

    To sign every package of a project, set `package.signing` in params.yaml.
    """
    if out := _dvc_output(bundle):
        raise FlowError(
            f"{out} is an output of DVC, and a new file in it would make its stage run again; set package.signing, or "
            "sign a copy"
        )
    _run("sign", str(bundle), *["--keyless"] * keyless)


def oci(bundle: Folder, to: Annotated[Path, typer.Option(help="Folder to create.", metavar="LAYOUT")]) -> None:
    """Write a bundle as an OCI image layout: a model car, with the files below /models.

    Equal bundles give equal images.
    """
    _run("oci", str(bundle), "--to", str(to))


def push(bundle: Bundle, address: Address) -> None:
    """Upload a bundle to a registry as an OCI image, and print its address with the digest.

    Credentials are those of `docker login`, or MODELPRESS_REGISTRY_USER and MODELPRESS_REGISTRY_PASSWORD.

    Example:

        modelpress push dist/smollm2-135m-instruct oci://registry.example.org/models/smollm2:1
    """
    _run("push", bundle, address)


def pull(
    address: Address,
    to: Annotated[Path, typer.Option(help="Folder to create.", metavar="DIR")],
    key: Key = None,
    identity: Identity = None,
    issuer: Issuer = None,
) -> None:
    """Fetch a bundle from a registry, and check it as `verify` does before the folder appears.

    `modelpress get` fetches the packages of this project's own runs.
    """
    _run("pull", address, "--to", str(to), *_signer(key, identity, issuer))


def _run(*arguments: str) -> None:
    """Run the program with this terminal, and end with its status."""
    command = [sys.executable, "-P", "-m", PROGRAM, *arguments]
    status = subprocess.run(command, env=stage_environment(os.environ), check=False).returncode
    if status:
        raise typer.Exit(status)


def _signer(key: Path | None, identity: str | None, issuer: str | None) -> list[str]:
    given = {"--key": key, "--identity": identity, "--issuer": issuer}
    return [str(word) for option, value in given.items() if value is not None for word in (option, value)]


def _dvc_output(folder: Path) -> Path | None:
    """`folder` if it is, or lies in, an output in the dvc.lock of its project."""
    path = folder.resolve()
    for root in path.parents:
        outs = {root / out["path"] for stage in lock_stages(root).values() for out in stage.get("outs", ())}
        if outs & {path, *path.parents}:
            return folder
    return None
