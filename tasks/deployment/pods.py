"""The containers of a pod: vLLM, and the proxy that guards it."""

from __future__ import annotations

from typing import Any

from tasks.deployment.arguments import DRAIN, MODEL, PORT
from tasks.deployment.groups import server_command
from tasks.deployment.sizing import GB, GIB, PROCESS, Plan

USER = 10001
PROXY_PORT = 8443
UNREADY = 10  # seconds until no new request arrives at a pod that ends
READ = 100 * 10**6  # bytes per second: a slow disk, for the time that a start may take
STARTING = 600  # seconds for the rest of a start: compiling, CUDA graphs
ENVIRONMENT = {
    "HOME": "/tmp",  # noqa: S108  a volume of its own; caches of compiled kernels go there
    "LOGNAME": "serve",  # the user has no name in the image, and torch asks for one
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # with AMX it would round activations, which were not when the model was checked
}


def environment(plan: Plan) -> dict[str, str]:
    """vLLM's environment variables. Its API servers wait for the copies as long as a start may take."""
    return {**ENVIRONMENT, "VLLM_ENGINE_READY_TIMEOUT_S": str(start_seconds(plan))}


def shared_memory(plan: Plan) -> int:
    """GiB of /dev/shm, through which the processes of one machine pass tensors."""
    return max(2, plan.cards)


def start_seconds(plan: Plan) -> int:
    """The longest time that a start may take."""
    return STARTING + plan.card_weights * plan.cards // READ


def secret_name(name: str) -> dict[str, str]:
    """Where the API key is."""
    return {"name": f"{name}-api-key", "key": "api-key"}


def secret_value(name: str) -> dict[str, Any]:
    """An environment variable's value: the API key."""
    return {"secretKeyRef": secret_name(name)}


def engine(name: str, plan: Plan, gpu: bool, container: str = "vllm", **changes: Any) -> dict[str, Any]:
    """vLLM's container. container: its name; changes: of its fields."""
    health = {"httpGet": {"path": "/health", "port": "engine"}}
    return {
        "name": container,
        "image": "${VLLM_IMAGE}",
        "command": server_command(plan),
        "env": [
            *({"name": key, "value": value} for key, value in environment(plan).items()),
            {"name": "VLLM_API_KEY", "valueFrom": secret_value(name)},
        ],
        "ports": [{"name": "engine", "containerPort": PORT}],
        **probes(health, plan),
        "lifecycle": {"preStop": {"sleep": {"seconds": UNREADY}}},
        "resources": _card_resources(plan) if gpu else memory_resources(plan, cached=plan.card_weights),
        "securityContext": _confined(),
        "volumeMounts": [
            {"name": "model", "mountPath": MODEL, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        ],
    } | changes


def probes(check: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Startup, readiness and liveness by one check. A busy server answers late, so only a long silence restarts it."""
    return {
        "startupProbe": {
            **check,
            "periodSeconds": 10,
            "timeoutSeconds": 10,
            "failureThreshold": -(-start_seconds(plan) // 10),
        },
        "readinessProbe": {**check, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        "livenessProbe": {**check, "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
    }


def proxy(name: str, *, tls: bool = True, container: str = "proxy", port: int = PROXY_PORT) -> dict[str, Any]:
    """Caddy's container. tls: with the certificate of the secret NAME-tls."""
    return {
        "name": container,
        "image": "${CADDY_IMAGE}",
        "command": ["caddy", "run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"],
        "env": [
            {"name": "UPSTREAM", "value": f"127.0.0.1:{PORT}"},
            {"name": "XDG_CONFIG_HOME", "value": "/tmp"},  # noqa: S108
            {"name": "XDG_DATA_HOME", "value": "/tmp"},  # noqa: S108
            {"name": "API_KEY", "valueFrom": secret_value(name)},
        ],
        "ports": [{"name": "api", "containerPort": port}],
        "readinessProbe": {"tcpSocket": {"port": "api"}, "periodSeconds": 5},
        "livenessProbe": {"tcpSocket": {"port": "api"}, "periodSeconds": 10},
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        # Caddy's program file carries this capability and cannot be started without it
        "securityContext": _confined("NET_BIND_SERVICE"),
        "volumeMounts": [
            {"name": "proxy", "mountPath": "/etc/caddy", "readOnly": True},
            *([{"name": "tls", "mountPath": "/tls", "readOnly": True}] if tls else []),
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        ],
    }


def pod(plan: Plan, product: str | None, containers: list[dict[str, Any]], **further: Any) -> dict[str, Any]:
    """The fields that all pods share. product: the GPU's label, for the node selector."""
    # nodes with GPUs often refuse pods without this
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "nodeSelector": {"nvidia.com/gpu.product": product} if product else {"kubernetes.io/os": "linux"},
        **({"tolerations": tolerations} if product else {}),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # they would set variables named VLLM_*, if a service is called so
        "terminationGracePeriodSeconds": UNREADY + 2 * DRAIN + 30,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": containers,
        **further,
    }


def volumes(name: str, plan: Plan, configuration: str | None = None, *, tls: bool = True) -> list[dict[str, Any]]:
    """The volumes for `engine`, and for `proxy` if the config map with its configuration is given."""
    found: list[dict[str, Any]] = [
        {"name": "model", "persistentVolumeClaim": {"claimName": name, "readOnly": True}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_memory(plan)}Gi"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    if configuration:
        found.append({"name": "proxy", "configMap": {"name": configuration}})
        found += [{"name": "tls", "secret": {"secretName": f"{name}-tls"}}] if tls else []
    return found


def memory_resources(plan: Plan, cached: int = 0) -> dict[str, Any]:
    """Of a server on a CPU. cached: bytes of files in the page cache that it takes for memory in use. They count toward
    the limit only, because the kernel can free them."""
    used = plan.card_weights + plan.room + PROCESS
    requested, limit = (f"{-(-size // GIB) + shared_memory(plan)}Gi" for size in (used, used + cached))
    return {"requests": {"cpu": "2", "memory": requested}, "limits": {"memory": limit}}


def _card_resources(plan: Plan) -> dict[str, Any]:
    requests = {"cpu": str(2 * plan.cards), "memory": f"{shared_memory(plan) + plan.cards * (PROCESS // GB)}Gi"}
    return {"requests": requests, "limits": {"nvidia.com/gpu": plan.cards}}


def _confined(*capabilities: str) -> dict[str, Any]:
    added = {"add": list(capabilities)} if capabilities else {}
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], **added},
    }
