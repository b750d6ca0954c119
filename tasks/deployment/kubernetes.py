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
_KSERVE_SECONDS = 3600  # that a request may take; KServe's default is 60
_BUSY = 0.8  # of the requests that a server can compute at once: with more, another server is started
# a new server needs the GPUs or the memory of an old one
_STRATEGY = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}


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
            "strategy": _STRATEGY,
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
    leader = _server(name, plan, product, command=command(follower=False))
    for guard in leader["initContainers"]:
        guard.pop("livenessProbe")  # another start of the proxy would start the whole group again
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
                "restartPolicy": "RecreateGroupAfterStart",  # not while a machine still pulls its image
                "leaderTemplate": {
                    "metadata": {"labels": {"app": name, "role": "server"}},
                    "spec": leader,
                },
                "workerTemplate": {
                    "metadata": {"labels": {"app": name, "role": "worker"}},
                    "spec": pod(plan, product, [worker], volumes=volumes(name, plan)),
                },
            },
        },
    }


def inference_service(name: str, plan: Plan, product: str | None, caddyfile: str) -> list[Manifest]:
    """KServe in its Standard mode. Its gateway ends TLS; the proxy beside vLLM guards the paths. KServe sets the label
    app itself, so its pods are selected by another one."""
    labels = {"serving.kserve.io/inferenceservice": name}
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
                    "timeout": _KSERVE_SECONDS,
                    "deploymentStrategy": _STRATEGY,
                    **pod(plan, product, containers, volumes=volumes(name, plan, f"{name}-kserve-proxy", tls=False)),
                }
            },
        },
        _network_policy(f"{name}-kserve", labels, KSERVE_PORT, several=False),
        _pod_monitor(f"{name}-kserve", labels),
    ]


def autoscaling(name: str, plan: Plan, requests: tuple[str, ...]) -> Manifest:
    """KEDA's rule: more servers than described while those are busy. requests: the metrics that count those that run or
    wait."""
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    if plan.grouped:
        target |= {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "name": f"{name}{GROUP}"}
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": _metadata(name),
        "spec": {
            "scaleTargetRef": target,
            "minReplicaCount": plan.servers,
            "maxReplicaCount": "${MAX_REPLICAS}",
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
                        "query": " + ".join(f'sum({metric}{{model_name="{name}"}})' for metric in requests),
                        "threshold": str(max(1, round(_BUSY * plan.sequences * plan.copies))),  # for each server
                    },
                }
            ],
        },
    }


def monitoring(name: str, rules: dict[str, Any], **changes: Any) -> list[Manifest]:
    """For the Prometheus operator: where the metrics are, and the alert rules. changes: of the endpoint's fields."""
    return [
        _pod_monitor(name, {"app": name, "role": "server"}, **changes),
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": _metadata(name),
            "spec": rules,
        },
    ]


def _pod_monitor(name: str, labels: dict[str, str], **changes: Any) -> Manifest:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _metadata(name),
        "spec": {
            "selector": {"matchLabels": labels},
            "podMetricsEndpoints": [{"port": "engine", "path": "/metrics", "interval": "15s", **changes}],
        },
    }


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
    """Requests through the proxy, metrics for Prometheus, between the machines, and for DNS; nothing else."""
    own = {"podSelector": {"matchLabels": labels}}
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "${MONITORING_NAMESPACE}"}}}
    # wherever the cluster's DNS is: in any namespace or on the node; behind its service, OpenShift has port 5353
    lookups = [{"protocol": protocol, "port": number} for number in (53, 5353) for protocol in ("UDP", "TCP")]
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
            "egress": [{"to": [own]}, {"ports": lookups}] if several else [],
        },
    }
