"""Decide which stages may start now: pure functions over the graph.

A stage starts when all its upstreams have succeeded. A `load` measures speed, so it runs alone, after all other
stages that are ready. `statistics` also runs alone, with all cores, because most other stages wait for it. This is a
policy of the flow and not part of dvc.yaml.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

Upstreams = Mapping[str, Collection[str]]  # stage -> its upstreams, in topological order


def runs_alone(stage: str) -> bool:
    """Whether `stage` must not run in parallel with others."""
    return stage.partition("@")[0] in ("load", "statistics")


def threads_of(stage: str, starting: Collection[str], running: Collection[str], jobs: int, cores: int) -> int:
    """The number of threads for `stage`, so that parallel stages do not share cores. starting: all stages to start now.

    If it is the only stage, no other can start before it ends, so it gets all cores.
    """
    alone = runs_alone(stage) or (not running and len(starting) == 1)
    return cores if alone else max(1, cores // jobs)


def startable(upstreams: Upstreams, done: Collection[str], running: Collection[str], jobs: int) -> list[str]:
    """The stages to start now, so that at most `jobs` run at a time.

    upstreams: only stages that can still run or have succeeded; done: the stages that have succeeded.
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
    """The stages that cannot run because an upstream failed, in order."""
    lost = set(failed)
    for stage, needs in upstreams.items():
        if any(need in lost for need in needs):
            lost.add(stage)
    return [stage for stage in upstreams if stage in lost and stage not in failed]
