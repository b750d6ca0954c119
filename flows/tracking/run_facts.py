"""Settings and figures of a finished run, from the files of the stages and DVC."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.graph.dvc_lock import lock_stages, params

# not recorded as metrics, because these are hundreds of figures; their file is recorded as an artifact
_TOO_MANY = frozenset({"layers"})


@dataclass(frozen=True)
class VariantFacts:
    """One variant for one target: its settings, figures (dotted names), tags, and the files of its metrics and greedy
    texts by stage. name: TARGET-VARIANT."""

    name: str
    target: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    files: dict[str, Path]


def variant_facts(root: Path) -> list[VariantFacts]:
    """The facts of every target and variant in params.yaml, from that file, the metrics of the variant and of both,
    the report and dvc.lock."""
    settings = params(root)
    stages, found = lock_stages(root), summaries(root)
    return [
        _facts(root, target, name, values, ((found.get(target) or {}).get("variants") or {}).get(name) or {}, stages)
        for target in settings.get("targets") or []
        for name, values in (settings.get("variants") or {}).items()
    ]


def summaries(root: Path) -> dict[str, dict[str, Any]]:
    """The report's summary of each target in params.yaml, in its order; without those that there is none of."""
    targets = params(root).get("targets") or []
    read = {str(target): read_json(root / "report" / str(target) / "summary.json") for target in targets}
    return {target: summary for target, summary in read.items() if summary}


def _facts(
    root: Path, target: str, name: str, settings: Any, summary: dict[str, Any], stages: dict[str, Any]
) -> VariantFacts:
    files = {path.parent.name: path for path in (root / "metrics").glob(f"*/{name}.json")}
    files |= {path.parents[1].name: path for path in (root / "metrics").glob(f"*/{target}/{name}.json")}
    content = {stage: read_json(path) for stage, path in sorted(files.items())} | {"report": summary}
    labels = flatten({"variant": name, "target": target, **settings})
    labels |= flatten(content.get("evaluate", {}).get("contract") or {}, "contract")
    metrics = {key: value for folder, values in content.items() for key, value in numbers(values, folder)}
    tags = {
        key: str(value)
        for key in ("verdict", "reason", "identity")
        if (value := summary.get(key) or content.get("quantize", {}).get(key)) is not None
    }
    for stage, entry in stages.items():
        if stage.partition("@")[2] in (name, f"{target}-{name}"):
            tags |= {f"dvc.{out['path']}": out["md5"] for out in entry.get("outs", []) if "md5" in out}
    texts = root / "results" / target / name / "texts.jsonl"
    if texts.is_file():
        files["results"] = texts
    return VariantFacts(f"{target}-{name}", target, labels, metrics, tags, files)


def git_tags(root: Path) -> dict[str, str]:
    """The commit of `root`, and whether tracked files differ from it; empty outside a repository."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git.commit": commit, "git.clean": str(not changed).lower()}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty if the file is missing or invalid."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """The leaves of nested mappings as text, by dotted name; a list is one leaf, written as JSON."""
    if isinstance(values, Mapping) and values:
        return {
            name: text
            for key, value in values.items()
            for name, text in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: values if isinstance(values, str) else json.dumps(values, default=str)}


def numbers(values: Any, prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings, by dotted name, without contracts and per-layer figures."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key not in _TOO_MANY and key != "contract":
                yield from numbers(value, f"{prefix}.{key}")
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield prefix, float(values)


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
