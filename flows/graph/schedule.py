"""Which stages may start now: a pure decision over the graph.

A stage starts when all that it needs has succeeded. A `benchmark` measures speed, so it runs with nothing
beside it, after everything that could run without it; and all wait for the `statistics`, so they get all cores. That is
policy of the flow, not of the graph in dvc.yaml.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

Upstreams = Mapping[str, Collection[str]]  # stage -> what it needs, every stage after its upstreams


def runs_alone(stage: str) -> bool:
    """Whether nothing else may run at the same time as `stage`."""
    return stage.partition("@")[0] in ("benchmark", "statistics")


def threads_of(stage: str, starting: Collection[str], running: Collection[str], jobs: int, cores: int) -> int:
    """The threads that `stage` of those that start now may use, so that all that run together use each core once.

    Where nothing runs and nothing else starts, nothing can start before it ends: it gets all cores.
    """
    alone = runs_alone(stage) or (not running and len(starting) == 1)
    return cores if alone else max(1, cores // jobs)


def startable(upstreams: Upstreams, done: Collection[str], running: Collection[str], jobs: int) -> list[str]:
    """The stages to start now, at most `jobs` at a time.

    `upstreams` holds only stages that may still run or have succeeded; `done` those that have succeeded.
    """
    if any(runs_alone(stage) for stage in running):
        return []
    ready = [
        stage
        for stage, needs in upstreams.items()
        if stage not in done and stage not in running and all(need in done for need in needs)
    ]
    together = [stage for stage in ready if not runs_alone(stage)]
    if together or running:
        return together[: max(jobs - len(running), 0)]
    return ready[:1]


def doomed(upstreams: Upstreams, failed: Collection[str]) -> list[str]:
    """The stages that cannot run because something that they need failed, in order."""
    lost = set(failed)
    for stage, needs in upstreams.items():
        if any(need in lost for need in needs):
            lost.add(stage)
    return [stage for stage in upstreams if stage in lost and stage not in failed]
