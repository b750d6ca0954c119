"""Compose files: the server behind its proxy, and Open WebUI beside them."""

from __future__ import annotations

import json
from typing import Any

from tasks.deployment.arguments import DRAIN, MODEL, ONNX_KEY, PORT
from tasks.deployment.groups import server_command
from tasks.deployment.pods import PROXY_PORT, USER, environment, shared_memory, start_seconds
from tasks.deployment.sizing import Plan

WEBUI_PORT = 8444
MACHINE = "x-machine"  # the key of what the described machine has
# the server's health, asked in its container
ASKS = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{PORT}/health', timeout=8)"
_KEY = "${API_KEY:?a secret, such as the output of openssl rand -hex 32}"
_TEMPORARY = "/tmp:mode=1777"  # noqa: S108
_CONFINED = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}


def image(variable: str, what: str) -> str:
    """An image that is asked for: compose refuses to start without it."""
    return f"${{{variable}:?the image of {what} by digest: name@sha256:...}}"


def compose(plan: Plan, gpu: bool, part: dict[str, Any]) -> dict[str, Any]:
    """One machine: the engine on a network of its own, and the proxy. part: what only this engine has, of `vllm`,
    `llama_cpp` or `onnx`."""
    engine: dict[str, Any] = {
        **part,
        "volumes": [{"type": "bind", "source": "..", "target": MODEL, "read_only": True}],
        "networks": ["inside"],
        "shm_size": f"{shared_memory(plan)}gb",
        "user": f"{USER}:{USER}",
        **_CONFINED,
        "tmpfs": part.get("tmpfs", [f"{_TEMPORARY},exec"]),  # compiled kernels are loaded from there
        "stop_grace_period": f"{DRAIN + 30}s",
        "restart": "unless-stopped",
    }
    engine["healthcheck"] |= {
        "interval": "10s",
        "timeout": "10s",
        "retries": 6,
        "start_period": f"{start_seconds(plan)}s",
    }
    if gpu:
        devices = [{"driver": "nvidia", "count": plan.cards, "capabilities": ["gpu"]}]
        engine["deploy"] = {"resources": {"reservations": {"devices": devices}}}
    proxy = {
        "image": image("CADDY_IMAGE", "Caddy"),
        "command": ["caddy", "run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"],
        "environment": {
            "API_KEY": _KEY,
            "UPSTREAM": f"model:{PORT}",
            "XDG_CONFIG_HOME": "/tmp",  # noqa: S108
            "XDG_DATA_HOME": "/tmp",  # noqa: S108
        },
        "volumes": [
            _read_only("./Caddyfile", "/etc/caddy/Caddyfile"),
            _read_only("${TLS_FOLDER:?a folder with tls.crt and tls.key}", "/tls"),
        ],
        "ports": [f"${{LISTEN:-127.0.0.1}}:{PROXY_PORT}:{PROXY_PORT}"],
        "networks": ["inside", "outside"],
        "depends_on": {"model": {"condition": "service_healthy"}},
        "user": f"{USER}:{USER}",
        **_CONFINED,
        "cap_add": ["NET_BIND_SERVICE"],  # Caddy's program file carries it and cannot be started without it
        "tmpfs": [_TEMPORARY],
        "stop_grace_period": f"{DRAIN + 15}s",  # compose ends it first, and it passes on the last answers
        "restart": "unless-stopped",
    }
    return {
        # for `modelpress deploy`; compose ignores it
        **({MACHINE: {"gpus": plan.cards + plan.unused}} if gpu else {}),
        "services": {"model": engine, "proxy": proxy},
        "networks": {"inside": {"internal": True}, "outside": {}},
    }


def compose_webui(calls: bool) -> dict[str, Any]:
    """Open WebUI, added to `compose`. calls: whether the engine reads the model's tool calls; otherwise its function
    calling is off."""
    webui = {
        "image": image("WEBUI_IMAGE", "Open WebUI"),
        "environment": {
            "OPENAI_API_BASE_URL": f"http://model:{PORT}/v1",
            "OPENAI_API_KEY": _KEY,
            "WEBUI_SECRET_KEY": "${WEBUI_SECRET_KEY:?a second secret}",
            "DATA_DIR": "/data",
            "STATIC_DIR": "/data/static",
            "HOME": "/data",
            "ENABLE_OLLAMA_API": "False",
            "ENABLE_VERSION_UPDATE_CHECK": "False",
            "OFFLINE_MODE": "True",
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "RAG_EMBEDDING_ENGINE": "openai",  # otherwise it fetches an embedding model
            **({} if calls else _no_tools()),
        },
        "volumes": [
            {"type": "bind", "source": f"${{WEBUI_DATA:?a folder that belongs to user {USER}}}", "target": "/data"}
        ],
        "networks": ["inside"],
        "depends_on": {"model": {"condition": "service_healthy"}},
        "user": f"{USER}:{USER}",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
    }
    proxy = {
        "volumes": [_read_only("./webui.caddy", "/etc/caddy/webui.caddy")],
        "ports": [f"${{LISTEN:-127.0.0.1}}:{WEBUI_PORT}:{WEBUI_PORT}"],
    }
    return {"services": {"webui": webui, "proxy": proxy}}


def _no_tools() -> dict[str, str]:
    """Without these, Open WebUI sends tools with every message, and the server refuses the request."""
    metadata = {"capabilities": {"builtin_tools": False}}
    parameters = {"function_calling": "legacy"}
    return {"DEFAULT_MODEL_METADATA": json.dumps(metadata), "DEFAULT_MODEL_PARAMS": json.dumps(parameters)}


def vllm(plan: Plan) -> dict[str, Any]:
    """vLLM's part of an engine."""
    program, *arguments = server_command(plan)
    return {
        "image": image("VLLM_IMAGE", "vLLM"),
        "entrypoint": [program],
        "command": arguments,
        "environment": {**environment(plan), "VLLM_API_KEY": _KEY},
        "healthcheck": {"test": ["CMD", "python3", "-c", ASKS]},
    }


def llama_cpp(arguments: list[str]) -> dict[str, Any]:
    """llama.cpp's part of an engine."""
    return {
        "image": image("LLAMA_CPP_IMAGE", "llama.cpp's server"),
        "command": arguments,
        "environment": {"LLAMA_API_KEY": _KEY},
        "healthcheck": {"test": ["CMD", "curl", "--fail", "--silent", f"http://127.0.0.1:{PORT}/health"]},
    }


def onnx(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The part of the server for ONNX exports. command: its arguments; the image has the program."""
    return {
        "image": "${ONNX_SERVER_IMAGE:?the image that serve/Dockerfile makes}",
        "command": command,
        "environment": {**environment, ONNX_KEY: _KEY},
        "healthcheck": {"test": ["CMD", "python", "-c", ASKS]},
        "tmpfs": [_TEMPORARY],
    }


def _read_only(source: str, target: str) -> dict[str, Any]:
    return {"type": "bind", "source": source, "target": target, "read_only": True}
