"""The schemas of the custom resources in a bundle's serve/, as their projects publish them: tests/crds.json.gz.

From Gateway API 1.6.1, LeaderWorkerSet 0.10.0, KServe 0.19.0, KEDA 2.20.1 and the Prometheus operator 0.93.0 (all under
Apache-2.0), without descriptions. To write the file again, from a folder with the files of their definitions (YAML):

python -m tests.crds FOLDER
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

FILE = Path(__file__).with_suffix(".json.gz")
KINDS = (
    "BackendTLSPolicy",
    "HTTPRoute",
    "InferenceService",
    "LeaderWorkerSet",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
)


def faults(manifest: dict[str, Any]) -> list[str] | None:
    """What its project's schema finds wrong with a manifest; None if it is of another kind."""
    schema = _schemas().get(f"{manifest['apiVersion']} {manifest['kind']}")
    if schema is None:
        return None
    errors = Draft202012Validator(schema).iter_errors(manifest)
    return [f"{list(error.absolute_path)}: {error.message}" for error in errors]


@cache
def _schemas() -> dict[str, Any]:
    return dict(json.loads(gzip.decompress(FILE.read_bytes())))


def _definitions(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The strict schema of every version of every custom resource in a folder."""
    for path in sorted(folder.glob("*.yaml")):
        for definition in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if definition and definition["kind"] == "CustomResourceDefinition":
                spec = definition["spec"]
                for version in spec["versions"]:
                    schema = _strict(version["schema"]["openAPIV3Schema"])
                    schema["properties"]["metadata"] = {"type": "object"}
                    yield f"{spec['group']}/{version['name']} {spec['names']['kind']}", schema


def _strict(schema: Any, properties: bool = False) -> Any:
    """Refuse unknown fields, read Kubernetes' own keywords, and leave out descriptions. properties: by their names."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if properties or key not in ("description", "example")}
    found = {key: _strict(value, key == "properties" and not properties) for key, value in kept.items()}
    if properties:
        return found
    if "properties" in found and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    if found.pop("x-kubernetes-int-or-string", False):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    for key in ("x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "format"):
        found.pop(key, None)
    return found


if __name__ == "__main__":
    read = dict(_definitions(Path(sys.argv[1])))
    assert {name.split()[1] for name in read} == set(KINDS), sorted(read)
    text = json.dumps(read, separators=(",", ":"), sort_keys=True)
    FILE.write_bytes(gzip.compress(text.encode(), mtime=0))
