"""Links into the web UIs: the form that starts a run, and the experiment's runs as a table."""

from __future__ import annotations

import json
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import quote

from flows.server.addresses import Addresses

if TYPE_CHECKING:
    from mlflow import MlflowClient

FORM = "press/on-demand"  # flow and deployment of the form, as in prefect.yaml
VIEW = "modelpress"
COLUMNS = (
    "tags.`verdict`",
    "params.`scheme`",
    "metrics.`report.kl`",
    "metrics.`report.ratio`",
    "metrics.`report.retention.mean`",
    "metrics.`report.size_bytes`",
)
ORDER = "metrics.`report.retention.mean`"  # sorted by time, MLflow would fold the variants under their runs


def form_link(addresses: Addresses) -> str:
    """The URL of the form that starts a run, or of all deployments if Prefect does not answer."""
    with suppress(OSError, ValueError, KeyError):
        url = f"{addresses.api}/deployments/name/{FORM}"
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own server
            return f"{addresses.prefect}/deployments/deployment/{json.load(answer)['id']}/run"
    return f"{addresses.prefect}/deployments"


def runs_link(addresses: Addresses, client: MlflowClient, experiment: str) -> str:
    """The URL of a table in MLflow with all variants of all runs and their main columns.

    MLflow reads the columns from a tag of the experiment, in the format of its "Share" button.
    """
    view = json.dumps({"selectedColumns": COLUMNS, "orderByKey": ORDER, "orderByAsc": False})
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{VIEW}", view)
    return f"{addresses.mlflow}/#/experiments/{quote(experiment)}/runs?viewStateShareKey={VIEW}"
