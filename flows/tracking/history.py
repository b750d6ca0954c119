"""`modelpress history`: compare the finished runs in MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.errors import FlowError
from flows.tracking.mlflow_run import GIT_TAG, PARENT_TAG, WINNER_TAG, open_store, store_error, tracking_uri
from flows.tracking.registry import CHAMPION
from tasks.old_words import new_record

_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Finished:
    """One target of a finished run. ended: in seconds since 1970; scheme and figures: of the winner, None or empty if
    unknown."""

    ended: float
    name: str
    tag: str
    target: str
    winner: str
    scheme: str
    size_bytes: float | None
    retention: tuple[float, float, float] | None  # estimate, and bounds of its interval
    perplexities: dict[str, float]  # by text
    champion_of: str | None  # the package's name, if its champion is from this run


def finished_runs(home: Path) -> list[Finished]:
    """All finished runs, newest first; empty if MLflow has no store yet. FlowError if MLflow fails."""
    uri = tracking_uri(home)
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).exists():
        return []  # opening it would create it
    try:
        client, experiment = open_store(home)
        runs = list(_all_runs(client, experiment))
        champions = _champions(client)
    except Exception as error:
        raise FlowError(store_error(home, error)) from error
    children = {(r.data.tags[PARENT_TAG], r.info.run_name): r.data for r in runs if PARENT_TAG in r.data.tags}
    parents = [run for run in runs if PARENT_TAG not in run.data.tags]
    return [
        _finished(run, target, winner, children.get((run.info.run_id, child)), champions)
        for run in parents
        for target, winner, child in _winners(run)
    ]


def _winners(run: Any) -> list[tuple[str, str, str]]:
    """For each target of a run: target, winner, and the name of the winner's run in MLflow."""
    tags = run.data.tags
    names = {key.removeprefix(WINNER_TAG): value for key, value in sorted(tags.items()) if key.startswith(WINNER_TAG)}
    if names:
        return [(target, winner, f"{target}-{winner}") for target, winner in names.items()]
    winner = tags.get("winner", "")  # of an earlier version, with one target
    return [(run.data.params.get("target", ""), winner, winner)]


def _finished(
    run: Any, target: str, name: str, winner: Any | None, champions: Mapping[str, list[tuple[str, str]]]
) -> Finished:
    """name: the winning variant; winner: its run in MLflow; champions: see `_champions`."""
    tag = run.data.tags.get(GIT_TAG, "")
    metrics = winner.metrics if winner else {}
    retention = tuple(metrics.get(f"report.retention.{key}") for key in ("mean", "low", "high"))
    texts, perplexity = "report.texts.", ".perplexity"
    return Finished(
        ended=run.info.end_time / 1000,
        name=run.info.run_name,
        tag=tag,
        target=target,
        winner=name,
        scheme=new_record(winner.params).get("scheme", "") if winner else "",
        size_bytes=metrics.get("report.size_bytes"),
        retention=None if None in retention else retention,  # type: ignore[arg-type]
        perplexities={
            key[len(texts) : -len(perplexity)]: value
            for key, value in sorted(metrics.items())
            if key.startswith(texts) and key.endswith(perplexity)
        },
        champion_of=_championed(champions.get(run.info.run_id) or champions.get(tag) or [], target),
    )


def _all_runs(client: Any, experiment: str) -> Iterator[Any]:
    """Parents and children, newest first."""
    page: str | None = None
    while True:
        found = client.search_runs(
            [experiment],
            "attributes.status = 'FINISHED'",
            order_by=["attributes.end_time DESC"],
            max_results=1000,
            page_token=page,
        )
        yield from found
        if not (page := found.token):
            return


def _championed(packages: list[tuple[str, str]], target: str) -> str | None:
    """The package for `target` among a run's champions; those of earlier versions name no target."""
    return next((name for name, of in packages if of in ("", target)), None)


def _champions(client: Any) -> dict[str, list[tuple[str, str]]]:
    """Run id or git tag of each champion -> name and target of its packages."""
    found: dict[str, list[tuple[str, str]]] = {}
    page: str | None = None
    while True:
        models = client.search_registered_models(max_results=100, page_token=page)
        for model in models:
            if number := model.aliases.get(CHAMPION):
                version = client.get_model_version(model.name, str(number))
                keys = (version.run_id, version.tags.get(GIT_TAG))
                for key in dict.fromkeys(filter(None, keys)):
                    found.setdefault(key, []).append((model.name, version.tags.get("target", "")))
        if not (page := models.token):
            return found
