"""Read the stages of dvc.yaml in order, with upstreams and the action that a run would take, through DVC's internals.

It uses its own Repo object, which is not shared with other threads. Reading changes nothing.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows.errors import FlowError

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

State = Literal["unchanged", "cached", "changed"]
ACTIONS: dict[State, str] = {"changed": "run", "cached": "restore", "unchanged": "-"}


@dataclass(frozen=True)
class Out:
    """One output of a stage; `size` in bytes from dvc.lock, None before the first run."""

    path: str
    size: int | None


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml and what a run would do with it.

    unchanged: nothing; cached: restore its outputs for these inputs from DVC's run cache; changed: run it, unless its
    upstreams write the same bytes as before.
    """

    name: str
    upstreams: tuple[str, ...]
    state: State
    reasons: tuple[str, ...]
    outs: tuple[Out, ...]
    command: str
    deps: tuple[str, ...]  # input files and folders, in the checkout
    params: Mapping[str, Any]  # file -> its parameters in it


Plan = Mapping[str, Stage]  # by name, every stage after its upstreams


def read_plan(root: Path) -> dict[str, Stage]:
    """The stages in `root` and what a run would do with them; FlowError if DVC cannot read the project."""
    with _repo(root) as repo:
        import networkx as nx

        graph = repo.index.graph  # edges point from a stage to its upstreams
        position = {stage: n for n, stage in enumerate(repo.index.stages)}
        order = list(nx.lexicographical_topological_sort(graph.reverse(), key=lambda s: position[s]))
        plan: dict[str, Stage] = {}
        restored: dict[str, Any] = {}  # path -> hash of outputs that the run cache would restore
        for stage in order:
            ups = sorted(graph.successors(stage), key=lambda s: position[s])
            plan[stage.name] = _judge(repo, stage, ups, plan, restored)
        return plan


def cache_folder(root: Path) -> Path:
    """The folder of DVC's cache in `root`: objects and run cache."""
    with _repo(root) as repo:
        return Path(str(repo.cache.local_cache_dir))


def forget_others(root: Path, stages: Collection[str]) -> None:
    """Remove stages that are not in `stages` from dvc.lock."""
    from dvc.utils.serialize import modify_yaml

    with modify_yaml(str(root / "dvc.lock")) as lock:
        for name in [name for name in lock["stages"] if name not in stages]:
            del lock["stages"][name]


def summary(plan: Plan) -> str:
    """Summarize in one line what a run would do."""
    count: Counter[str] = Counter(stage.state for stage in plan.values())
    words = {"changed": "to run", "cached": "to restore from the cache", "unchanged": "unchanged"}
    return f"{len(plan)} stages: " + ", ".join(f"{count[s]} {text}" for s, text in words.items() if count[s])


def _judge(repo: Repo, stage: PipelineStage, ups: list[PipelineStage], plan: Plan, restored: dict[str, Any]) -> Stage:
    moving = [up for up in ups if plan[up.name].state != "unchanged"]
    reasons = _reasons(stage, moving)
    state: State = "unchanged"
    if reasons or moving:
        hashes = None
        if all(plan[up.name].state == "cached" for up in moving):
            hashes = _restorable(repo, stage, moving, restored)
        state = "changed" if hashes is None else "cached"
        restored.update(hashes or {})
        reasons += [_follows([up.name for up in moving])] if moving else []
    return Stage(
        name=stage.name,
        upstreams=tuple(up.name for up in ups),
        state=state,
        reasons=tuple(reasons),
        outs=tuple(Out(out.def_path, out.meta.size if out.meta and out.hash_info else None) for out in stage.outs),
        command=str(stage.cmd),
        deps=tuple(dep.def_path for dep in stage.deps if dep not in stage.params),
        params={str(dep.def_path): dep.read_params(flatten=True) for dep in stage.params},
    )


def _reasons(stage: PipelineStage, moving: list[PipelineStage]) -> list[str]:
    """Readable reasons why DVC would not skip the stage, except changes by its upstreams that run."""
    if not any(item.hash_info for item in [*stage.deps, *stage.outs]):
        return ["has not run yet"]
    reasons = ["its command changed"] if stage.changed_stage() else []
    reasons += ["is set to run always"] if stage.is_callback or stage.always_changed else []
    theirs = [Path(out.fs_path) for up in moving for out in up.outs]
    deps = [] if stage.frozen else [dep for dep in stage.deps if not touches(Path(dep.fs_path), theirs)]
    for item in [*deps, *stage.outs]:
        for what, status in item.status().items():
            # for parameters, the status is a mapping: key -> new, modified, deleted
            if isinstance(status, dict):
                reasons += [f"{what}: {key} is {how}" for key, how in status.items()]
            else:
                reasons.append(f"{item.def_path} is {status}")
    return reasons


def touches(path: Path, others: list[Path]) -> bool:
    """Whether `path` equals, contains or is inside one of the others."""
    return any(path == other or path in other.parents or other in path.parents for other in others)


def _follows(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"follows {', '.join(names[:3])}{more}"


def _restorable(
    repo: Repo, stage: PipelineStage, moving: list[PipelineStage], restored: dict[str, Any]
) -> dict[str, Any] | None:
    """Hashes by path of the outputs that the run cache would restore for `stage`; None if it must run."""
    from dvc.stage.cache import _get_cache_hash
    from dvc.stage.loader import StageLoader
    from dvc.stage.serialize import to_single_stage_lockfile

    if stage.is_callback or stage.always_changed or not (stage.deps and stage.outs):
        return None
    cache = repo.stage_cache
    if not moving and not stage.changed_stage() and stage.deps_cached() and all(o.hash_info for o in stage.outs):
        entry = to_single_stage_lockfile(stage)  # only outputs are missing or modified
    else:
        for dep in stage.deps:
            if dep.def_path in restored:
                dep.hash_info, dep.meta = restored[dep.def_path]
            elif not dep.exists or touches(Path(dep.fs_path), [Path(out.fs_path) for up in moving for out in up.outs]):
                return None  # a restore will change its contents: hash unknown yet
            else:
                dep.save()
        key = _get_cache_hash(to_single_stage_lockfile(stage), key=True)
        folder = Path(cache._get_cache_dir(key))
        newest = max(folder.iterdir(), key=lambda p: p.stat().st_mtime, default=None) if folder.is_dir() else None
        entry = cache._load_cache(key, newest.name) if newest else None
    if not entry:
        return None
    StageLoader.fill_from_lock(stage, entry)
    for out in stage.outs:
        out.use_cache = True  # the run cache also stores uncached outputs
    if not stage.outs_cached():
        return None
    return {out.def_path: (out.hash_info, out.meta) for out in stage.outs}


@contextmanager
def _repo(root: Path) -> Iterator[Repo]:
    """DVC's Repo for `root`, silent; its errors become FlowError."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    for name in ("dvc", "dvc_data", "dvc_objects"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with Repo(str(root)) as repo:
            yield repo
    except DvcException as error:
        raise FlowError(f"DVC cannot read the pipeline in {root}: {_chain(error)}") from error


def _chain(error: BaseException) -> str:
    """An error of DVC and its causes in one line: the useful part is often in a cause."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = " ".join(str(cause).split())
        if text and text not in parts:
            parts.append(text)
        cause = cause.__cause__
    return ": ".join(parts)
