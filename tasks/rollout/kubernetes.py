"""The manifests of a deployment: objects of each version, and a route of the Gateway API that shares the requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tasks.deployment.kubernetes import GROUP
from tasks.deployment.yaml_text import to_yaml
from tasks.errors import TaskError
from tasks.rollout.bundles import GROUP_FILE, read_manifests, with_images
from tasks.rollout.record import Deployment, Version

_LONGEST = 52  # characters of a version's name in the cluster: longer ones leave no room for the ends of derived names
_LONGEST_GROUP = _LONGEST - len("-group-999")  # a StatefulSet with the name and number of a group has at most _LONGEST
_GROUP = "gateway.networking.k8s.io"
CURRENT, RETIRED, ROUTE = "kubernetes", "retired", "route.yaml"

Bundle = Callable[[Version], Path]


def manifest_files(deployment: Deployment, bundle: Bundle) -> dict[str, str]:
    """Names and texts of the manifests: kubernetes/ for what serves, retired/ for what the last change took out."""
    files = {f"{CURRENT}/{ROUTE}": to_yaml(_route(deployment))}
    for folder, versions in ((CURRENT, deployment.versions), (RETIRED, deployment.retired)):
        for version in versions:
            for name, manifests in _own_manifests(deployment, version, bundle(version)):
                files[f"{folder}/{version.name}/{name}"] = to_yaml(manifests)
    return files


def steps(to: Path, deployment: Deployment, bundle: Bundle) -> list[str]:
    """The commands that bring the manifests in `to` to a cluster. The route moves once the newest version is ready."""
    folder, new = to / CURRENT, deployment.versions[-1]
    own = " ".join(f"--filename {folder / version.name}" for version in deployment.versions)
    name = own_name(deployment.served, new)
    ready = f"kubectl rollout status deployment/{name}"
    if GROUP_FILE in read_manifests(bundle(new)):
        ready = f"kubectl wait --for condition=Available --timeout 2h leaderworkerset/{name}{GROUP}"
    several = len(deployment.versions) > 1 or deployment.retired
    beside = "    # beside the other version: as many free GPUs, or as much memory, again" if several else ""
    found = [f"kubectl apply --recursive {own}{beside}", ready, f"kubectl apply --filename {folder / ROUTE}"]
    return [*found, f"kubectl delete --recursive --filename {to / RETIRED}"] if deployment.retired else found


def own_name(served: str, version: Version, longest: int = _LONGEST) -> str:
    """The name of a version's objects; TaskError if it is too long."""
    own = f"{served}-{version.name}"
    if len(own) > longest:
        raise TaskError(
            f"{own} has {len(own)} characters, and names in a cluster can have {longest} here; choose a shorter "
            "package.name or name of the run"
        )
    return own


def _own_manifests(
    deployment: Deployment, version: Version, bundle: Path
) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    files = read_manifests(bundle)
    own = own_name(deployment.served, version, _LONGEST_GROUP if GROUP_FILE in files else _LONGEST)
    for file, manifests in files.items():
        named = [_renamed(manifest, deployment.served, own) for manifest in manifests]
        placed = _with_value(named, "${MONITORING_NAMESPACE}", deployment.place.monitoring)
        yield file, with_images(placed, version.images)


def _renamed(manifest: dict[str, Any], served: str, own: str) -> dict[str, Any]:
    """The manifest with its own name, labels, volume claim and config map, so that versions do not meet.

    The secrets with API key and certificate keep their names, because all versions share them.
    """

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(one) for one in value]
        if not isinstance(value, dict):
            return value
        found = {key: walk(one) for key, one in value.items()}
        if found.get("app") == served:
            found["app"] = own
        for key, field in (("persistentVolumeClaim", "claimName"), ("configMap", "name")):
            if isinstance(found.get(key), dict) and field in found[key]:
                found[key] = found[key] | {field: own + found[key][field].removeprefix(served)}
        return found

    found: dict[str, Any] = walk(manifest)
    metadata = found["metadata"]
    found["metadata"] = metadata | {"name": own + metadata["name"].removeprefix(served)}
    return found


def _route(deployment: Deployment) -> list[dict[str, Any]]:
    """The route, and the policy by which the gateway speaks TLS with the proxies of the versions."""
    served, place = deployment.served, deployment.place
    names = [own_name(served, version) for version in deployment.versions]
    namespace, _, gateway = (place.gateway or "").rpartition("/")
    parent = {"name": gateway, **({"namespace": namespace} if namespace else {})}
    backends = [
        {"name": name, "port": 443, "weight": version.weight}
        for name, version in zip(names, deployment.versions, strict=True)
    ]
    metadata = {"name": served, "labels": {"app": served}}
    return [
        {
            "apiVersion": f"{_GROUP}/v1",
            "kind": "HTTPRoute",
            "metadata": metadata,
            "spec": {
                "parentRefs": [parent],
                "hostnames": [place.hostname],
                # a long answer is no failure
                "rules": [{"backendRefs": backends, "timeouts": {"request": "0s"}}],
            },
        },
        {
            "apiVersion": f"{_GROUP}/v1",
            "kind": "BackendTLSPolicy",
            "metadata": metadata,
            "spec": {
                "targetRefs": [{"group": "", "kind": "Service", "name": name} for name in names],
                "validation": {
                    "caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": f"{served}-ca"}],
                    "hostname": place.hostname,
                },
            },
        },
    ]


def _with_value(value: Any, variable: str, text: str | None) -> Any:
    if isinstance(value, dict):
        return {key: _with_value(one, variable, text) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_value(one, variable, text) for one in value]
    return text if value == variable else value
