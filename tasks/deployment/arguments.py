"""The arguments of the servers: vLLM's settings file, llama.cpp's arguments, and those of the server for ONNX exports.

All other files of serve/ refer to these, so that a setting stands in one place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.deployment.sizing import GIB, SHARE, Plan
from tasks.deployment.tool_calling import Template

MODEL = "/model"  # where the bundle is mounted, read-only
SETTINGS = "serve/vllm.yaml"
PORT, RANKS_PORT, COPIES_PORT, LIFELINE_PORT = 8000, 29500, 13345, 13344
DRAIN = 60  # seconds for the requests that are running when the server is told to end
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
)  # that vLLM takes from generation_config.json
ONNX_KEY = "ONNX_SERVER_API_KEY"  # the variable that the server for ONNX exports reads
_LLAMA_CPP = {"repetition_penalty": "repeat-penalty", "temperature": "temp"}
_SLOTS = 4  # requests that llama.cpp answers at once, each with the full context


def vllm_settings(name: str, plan: Plan, template: Template, gpu: bool) -> dict[str, Any]:
    """The contents of vllm.yaml: long options of `vllm serve` without dashes."""
    settings: dict[str, Any] = {
        "served-model-name": name,
        "host": "0.0.0.0",  # noqa: S104  reached only through the proxy
        "port": PORT,
        "dtype": "auto",
        "kv-cache-dtype": "auto",
        "max-num-seqs": plan.sequences,
        "tensor-parallel-size": plan.tensor,
        "shutdown-timeout": DRAIN,
        "disable-fastapi-docs": True,
        "disable-access-log-for-endpoints": "/health,/metrics",
    }
    if plan.context:
        settings["max-model-len"] = plan.context
    settings |= {"gpu-memory-utilization": SHARE} if gpu else {"kv-cache-memory-bytes": plan.room}
    if plan.copies > 1:
        settings["data-parallel-size"] = plan.copies
    if plan.experts and plan.copies > 1:
        settings["enable-expert-parallel"] = True
    if plan.grouped:
        settings |= {"pipeline-parallel-size": plan.pipeline, "nnodes": plan.pipeline, "master-port": RANKS_PORT}
        settings["distributed-executor-backend"] = "mp"
    if template.parser:
        settings |= {"enable-auto-tool-choice": True, "tool-call-parser": template.parser}
    return settings


def vllm_command(*further: str) -> list[str]:
    """The command that serves the mounted bundle; later arguments take precedence over the settings file."""
    return ["vllm", "serve", MODEL, "--config", f"{MODEL}/{SETTINGS}", *further]


def llama_cpp_command(name: str, plan: Plan, sampling: dict[str, Any], gpu: bool) -> list[str]:
    """The arguments of llama.cpp's server."""
    slots = max(1, min(_SLOTS, plan.kv_tokens // plan.context)) if plan.context else 1
    return [
        *("--model", f"{MODEL}/model.gguf", "--alias", name, "--host", "0.0.0.0", "--port", str(PORT)),  # noqa: S104
        *(("--ctx-size", str(slots * plan.context), "--parallel", str(slots)) if plan.context else ()),
        *("--jinja", "--metrics"),
        *(("--n-gpu-layers", "all") if gpu else ()),
        *(part for key, value in sampling.items() for part in (f"--{_option(key)}", str(value))),
    ]


def onnx_module() -> list[str]:
    """The program of the server for ONNX exports."""
    return ["python", "-m", "onnx_server"]


def onnx_command(name: str, plan: Plan) -> list[str]:
    """The arguments with which that server serves the mounted bundle."""
    return [MODEL, "--host", "0.0.0.0", "--port", str(PORT), *onnx_arguments(name, plan)]  # noqa: S104


def onnx_arguments(name: str, plan: Plan) -> list[str]:
    """Of them, those that do not depend on the place. Everything else is the server's default."""
    return [
        *("--served-model-name", name),
        *(("--max-model-len", str(plan.context)) if plan.context else ()),
        *("--kv-cache-gib", str(plan.room // GIB), "--max-batch", str(plan.sequences)),
        *("--drain-seconds", str(DRAIN)),
    ]


def _option(key: str) -> str:
    return _LLAMA_CPP.get(key, key.replace("_", "-"))


def recommended_sampling(directory: Path) -> dict[str, Any]:
    """What the source recommends for sampling, from its generation_config.json; empty if nothing."""
    path = directory / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: values[key] for key in SAMPLING if values.get(key) is not None}
