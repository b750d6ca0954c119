"""Kubernetes manifests as data: one machine, several machines, KServe, autoscaling and monitoring."""

from __future__ import annotations

from typing import Any

from tasks.deployment.arguments import DRAIN, PORT
from tasks.deployment.groups import group_size, in_group, machine_command
from tasks.deployment.pods import PROXY_PORT, UNREADY, engine, pod, proxy, start_seconds, volumes
from tasks.deployment.sizing import Plan

Manifest = dict[str, Any]
GROUP = "-group"  # ends the name of a LeaderWorkerSet
KSERVE_PORT = 8080
_WAITING = 5  # requests that wait for one server before another is started


def common(name: str, caddyfile: str, plan: Plan) -> list[Manifest]:
    """What every way of serving needs: the proxy's configuration, the service, and the network policy."""
    return [
        _config_map(name, f"{name}-proxy", caddyfile),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _metadata(name),
            "spec": {
                "selector": {"app": name, "role": "server"},
                "ports": [{"name": "api", "port": 443, "targetPort": "api"}],
            },
        },
        _network_policy(name, {"app": name}, PROXY_PORT, several=plan.joined),
    ]


def deployment(name: str, plan: Plan, product: str | None, **changes: Any) -> Manifest:
    """Servers that each hold the whole model, one on each machine. changes: of the fields of vLLM's container."""
    labels = {"app": name, "role": "server"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(name),
        "spec": {
            "replicas": plan.machines,
            "selector": {"matchLabels": labels},
            # a new server needs the GPUs or the memory of an old one
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "progressDeadlineSeconds": start_seconds(plan) + 600,
            "template": {"metadata": {"labels": labels}, "spec": _server(name, plan, product, **changes)},
        },
    }


def leader_worker_set(name: str, plan: Plan, product: str | None) -> Manifest:
    """Several machines behind one address; if one is lost, all start again together."""
    size = group_size(plan)

    def command(follower: bool) -> list[str]:
        leader, rank = "$(LWS_LEADER_ADDRESS)", "$(LWS_WORKER_INDEX)" if follower else "0"
        own = machine_command(plan, leader, rank, first=f"$((LWS_WORKER_INDEX * {plan.copies}))")
        if follower and not plan.grouped:  # the shell computes the number of the first copy
            own = ["sh", "-c", "exec " + " ".join(own)]
        return in_group(plan, leader, rank, own)

    # it has no port to ask: lifeline.py ends it with the leader, which has probes. Like the leader, it is told to end
    # when no new requests arrive, because it passes that on
    worker = engine(name, plan, product is not None, command=command(follower=True))
    for field in ("startupProbe", "readinessProbe", "livenessProbe", "ports"):
        worker.pop(field)
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        # LeaderWorkerSet makes a service with its name, by which the machines find each other: not that of clients
        "metadata": _metadata(name) | {"name": f"{name}{GROUP}"},
        "spec": {
            "replicas": plan.machines // size,
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": {
                "size": size,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": {
                    "metadata": {"labels": {"app": name, "role": "server"}},
                    "spec": _server(name, plan, product, command=command(follower=False)),
                },
                "workerTemplate": {
                    "metadata": {"labels": {"app": name, "role": "worker"}},
                    "spec": pod(plan, product, [worker], volumes=volumes(name, plan)),
                },
            },
        },
    }


def inference_service(name: str, plan: Plan, product: str | None, caddyfile: str) -> list[Manifest]:
    """KServe in its Standard mode. Its gateway ends TLS; the proxy beside vLLM guards the paths."""
    containers = [
        engine(name, plan, product is not None, container="kserve-container"),
        # KServe sends requests to the container of this name
        proxy(name, tls=False, container="transformer-container", port=KSERVE_PORT),
    ]
    # both containers get the signal at once: the proxy waits until vLLM has answered
    containers[1]["lifecycle"] = {"preStop": {"sleep": {"seconds": UNREADY + DRAIN + 5}}}
    return [
        _config_map(name, f"{name}-kserve-proxy", caddyfile),
        {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": _metadata(name)
            | {
                "annotations": {
                    "serving.kserve.io/deploymentMode": "Standard",
                    "serving.kserve.io/autoscalerClass": "none",
                }
            },
            "spec": {
                "predictor": {
                    "minReplicas": plan.machines,
                    "maxReplicas": plan.machines,
                    **pod(plan, product, containers, volumes=volumes(name, plan, f"{name}-kserve-proxy", tls=False)),
                }
            },
        },
        _network_policy(f"{name}-kserve", {"serving.kserve.io/inferenceservice": name}, KSERVE_PORT, several=False),
    ]


def autoscaling(name: str, plan: Plan, waiting: str) -> Manifest:
    """KEDA's rule: more servers while requests wait. waiting: the metric that counts them."""
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    if plan.grouped:
        target |= {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "name": f"{name}{GROUP}"}
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": _metadata(name),
        "spec": {
            "scaleTargetRef": target,
            "minReplicaCount": 1,
            "maxReplicaCount": "${MAX_REPLICAS}",
            # a new server takes this long to be of use
            "cooldownPeriod": start_seconds(plan),
            "advanced": {
                "horizontalPodAutoscalerConfig": {
                    "behavior": {"scaleDown": {"stabilizationWindowSeconds": min(3600, start_seconds(plan))}}
                }
            },
            "triggers": [
                {
                    "type": "prometheus",
                    "metadata": {
                        "serverAddress": "${PROMETHEUS_URL}",
                        "query": f'sum({waiting}{{model_name="{name}"}})',
                        "threshold": str(_WAITING),
                    },
                }
            ],
        },
    }


def monitoring(name: str, rules: dict[str, Any], **changes: Any) -> list[Manifest]:
    """For the Prometheus operator: where the metrics are, and the alert rules. changes: of the endpoint's fields."""
    return [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PodMonitor",
            "metadata": _metadata(name),
            "spec": {
                "selector": {"matchLabels": {"app": name, "role": "server"}},
                "podMetricsEndpoints": [{"port": "engine", "path": "/metrics", "interval": "15s", **changes}],
            },
        },
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": _metadata(name),
            "spec": rules,
        },
    ]


def _server(name: str, plan: Plan, product: str | None, **changes: Any) -> dict[str, Any]:
    # a sidecar ends after the containers, so it still serves while vLLM answers the last requests
    guard = {**proxy(name), "restartPolicy": "Always"}
    containers = [engine(name, plan, product is not None, **changes)]
    return pod(plan, product, containers, initContainers=[guard], volumes=volumes(name, plan, f"{name}-proxy"))


def _metadata(name: str) -> dict[str, Any]:
    return {"name": name, "labels": {"app": name}}


def _config_map(name: str, own: str, caddyfile: str) -> Manifest:
    metadata = _metadata(name) | {"name": own}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"Caddyfile": caddyfile}}


def _network_policy(name: str, labels: dict[str, str], port: int, *, several: bool) -> Manifest:
    """Requests through the proxy, metrics for Prometheus, and between the machines; nothing else, in or out."""
    own = {"podSelector": {"matchLabels": labels}}
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "${MONITORING_NAMESPACE}"}}}
    dns = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    lookups = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(name),
        "spec": {
            "podSelector": {"matchLabels": labels},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"ports": [{"protocol": "TCP", "port": port}]},
                {"from": [prometheus], "ports": [{"protocol": "TCP", "port": PORT}]},
                *([{"from": [own]}] if several else []),
            ],
            "egress": [{"to": [own]}, {"to": [dns], "ports": lookups}] if several else [],
        },
    }
