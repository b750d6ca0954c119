"""`modelpress deploy`: bring the bundle of a finished run, and write the files that serve it.

modelpress deploy champion --to live --image vllm=NAME@sha256:... --image caddy=NAME@sha256:...
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.errors import FlowError


def deploy(
    to: Annotated[Path, typer.Option(help="Folder of the deployment. It is created, or changed.", metavar="DIR")],
    what: Annotated[
        str | None,
        typer.Argument(help="run/NAME, the tag of a finished run; or champion, the best package in MLflow's registry."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=IMAGE",
            help="An image by digest, such as vllm=IMAGE@sha256:... and caddy=IMAGE@sha256:.... Can be repeated. "
            "Default: that of the version before.",
        ),
    ] = None,
    canary: Annotated[
        int | None,
        typer.Option(metavar="PERCENT", help="Give it only this share of the requests, beside the version before."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="TARGET", help="The target of the bundle, if the run has several.")
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="Return to the version before.")] = False,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Write manifests instead of a compose file.")
    ] = False,
    gateway: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Kubernetes: the Gateway of the route, NAME or NAMESPACE/NAME."),
    ] = None,
    hostname: Annotated[
        str | None, typer.Option(metavar="HOST", help="Kubernetes: the host name of clients and certificate.")
    ] = None,
    monitoring: Annotated[
        str, typer.Option(metavar="NAMESPACE", help="Kubernetes: Prometheus' namespace.")
    ] = "monitoring",
) -> None:
    """Bring the bundle of a finished run, and write the compose file or the manifests that serve it beside it.

    Nothing is started: docker compose or kubectl does what the files say. The version before is kept for `--back`.
    `deployment.json` says what is there. The same command again changes nothing.

    Examples:

        modelpress deploy champion --to live --image vllm=NAME@sha256:... --image caddy=NAME@sha256:...

        modelpress deploy run/quiet-otter --to live --canary 10

        modelpress deploy run/quiet-otter --to live

        modelpress deploy --back --to live
    """
    if (what is None) != back:
        raise FlowError("name either a version, run/NAME or champion, or --back")
    if back and (image or canary is not None):
        raise FlowError("--back takes no --image and no --canary: the version before keeps its images")
    if canary is not None and not 1 <= canary <= 99:
        raise FlowError(f"--canary is {canary}, expected a share of the requests from 1 to 99 percent")
    from flows.deployments import change, place_of  # takes a third of a second to import

    place = place_of(kubernetes, gateway, hostname, monitoring)
    print("\n".join(change(to, (what, target) if what else None, image or [], canary, place)))
