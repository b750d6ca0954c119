"""The target onnx: its plan on a CPU, the files of its server, its image and its container.

The server is tasks/serving/onnx_server, which runs without this project. It is copied as files, not imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.deployment.arguments import MODEL, ONNX_KEY, PORT, onnx_command, onnx_module
from tasks.deployment.compose import ASKS
from tasks.deployment.pods import USER, memory_resources, secret_value, start_seconds
from tasks.deployment.shape import Shape
from tasks.deployment.sizing import Plan
from tasks.deployment.sizing import plan as plan_of
from tasks.settings import HardwareSettings

FOLDER = Path(__file__).parents[1] / "serving" / "onnx_server"
LOCK = Path(__file__).parents[2] / "locks" / "onnx.lock"
REQUIREMENTS = "requirements.txt"
IMAGE_CODE = "/server"  # in the image: the folder that holds the server's package
ENVIRONMENT = {
    "HOME": "/tmp",  # noqa: S108  a volume of its own
    "PYTHONDONTWRITEBYTECODE": "1",  # the file system is read-only
    "ORT_DISABLE_TELEMETRY": "1",
}
_BATCH = 16  # texts computed together, at most; more make each one slower on a CPU


def server_files() -> Iterator[tuple[str, str]]:
    """The server's files: names below serve/, and texts."""
    for path in sorted(FOLDER.glob("*.py")):
        yield f"{FOLDER.name}/{path.name}", path.read_text(encoding="utf-8")
    yield f"{FOLDER.name}/{REQUIREMENTS}", LOCK.read_text(encoding="utf-8")


def onnx_plan(shape: Shape, hardware: HardwareSettings | None) -> Plan:
    """The plan for a CPU. Described GPUs say nothing of the machine's memory, so then it is one that is not described.

    TaskError with the numbers if the model does not fit.
    """
    found = plan_of(shape, None if hardware and hardware.gpu else hardware)
    return replace(found, sequences=min(_BATCH, found.sequences))


def image_values(name: str, plan: Plan) -> dict[str, Any]:
    """The values of the Dockerfile's template."""
    return {
        "name": name,
        "model": MODEL,
        "code": IMAGE_CODE,
        "environment": {**ENVIRONMENT, "PYTHONPATH": IMAGE_CODE},
        "requirements": REQUIREMENTS,
        "user": USER,
        "port": PORT,
        "seconds": start_seconds(plan),
        "health": json.dumps(["python", "-c", ASKS]),
        "module": json.dumps(onnx_module()),
        "command": json.dumps(onnx_command(name, plan)),
    }


def container(name: str, plan: Plan) -> dict[str, Any]:
    """The arguments of `pods.engine` for its container."""
    return {
        "container": "onnx-server",  # its name
        "image": "${ONNX_SERVER_IMAGE}",
        "command": [*onnx_module(), *onnx_command(name, plan)],
        "env": [
            *({"name": key, "value": value} for key, value in ENVIRONMENT.items()),
            {"name": ONNX_KEY, "valueFrom": secret_value(name)},
        ],
        "resources": memory_resources(plan),
    }
