"""Links that open where a user wants to be: the form that starts a run, and this experiment's runs as a table."""

from __future__ import annotations

import json
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import quote

from flows.server.addresses import Addresses

if TYPE_CHECKING:
    from mlflow import MlflowClient

FORM = "press/on-demand"  # the flow and the deployment whose form a user fills in: prefect.yaml
VIEW = "modelpress"
COLUMNS = (
    "tags.`verdict`",
    "params.`scheme`",
    "metrics.`report.kl`",
    "metrics.`report.ratio`",
    "metrics.`report.retention.mean`",
    "metrics.`report.size_bytes`",
)
ORDER = "metrics.`report.retention.mean`"  # by another order than time, variants are listed and not folded below runs


def form_link(addresses: Addresses) -> str:
    """The page on which a run is started; all deployments where Prefect does not tell."""
    with suppress(OSError, ValueError, KeyError):
        url = f"{addresses.api}/deployments/name/{FORM}"
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own server
            return f"{addresses.prefect}/deployments/deployment/{json.load(answer)['id']}/run"
    return f"{addresses.prefect}/deployments"


def runs_link(addresses: Addresses, client: MlflowClient, experiment: str) -> str:
    """All variants of all runs, with the columns that tell them apart.

    MLflow's pages take the columns from a tag of the experiment, as their own button "Share" writes it.
    """
    view = json.dumps({"selectedColumns": COLUMNS, "orderByKey": ORDER, "orderByAsc": False})
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{VIEW}", view)
    return f"{addresses.mlflow}/#/experiments/{quote(experiment)}/runs?viewStateShareKey={VIEW}"
