"""vLLM itself reads the files of serve/: its argument parser, its configuration, its tool parsers and metrics.

MODELPRESS_VLLM_PYTHON: the Python of an environment with vLLM (docs/deploying.md).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.deployment.monitoring import alert_rules, dashboard
from tasks.deployment.shape import read_shape
from tasks.deployment.sizing import obstacles
from tasks.deployment.tool_calling import PARSERS
from tasks.deployment.write import write_serving
from tasks.settings import check_settings
from tests.tiny import CONTEXT, tiny_model
from tests.unit.test_deployment import HARDWARE, WITH_TOOLS, manifests
from tests.unit.test_sizing import LARGE

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("MODELPRESS_VLLM_PYTHON", "")
SIZES = range(1, 13)

pytestmark = pytest.mark.skipif(not PYTHON, reason="MODELPRESS_VLLM_PYTHON names no interpreter")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle with a tiny model for each kind of hardware, sized as if it were a large one."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.deployment.write.read_shape", lambda _: replace(LARGE, context=CONTEXT))
        for name, hardware in HARDWARE.items():
            made[name] = tiny_model(tmp_path_factory.mktemp(name) / "model", heads=12, kv_heads=4, hidden=96)
            if name == "one":
                (made[name] / "chat_template.jinja").write_text(WITH_TOOLS)
            params = yaml.safe_load((ROOT / "params.yaml").read_text())
            params["package"]["hardware"] = hardware
            write_serving(made[name], check_settings(params), "vllm", "awq-int4")
    return made


@pytest.fixture(scope="module")
def commands(bundles: dict[str, Path]) -> dict[str, list[str]]:
    """Every command line of README and Kubernetes manifests, by hardware and place, with values filled in."""
    found = {}
    for name, bundle in bundles.items():
        lines = re.findall(
            r"^(?:python3 .* -- )?vllm (serve .*?)(?:   #.*)?$", (bundle / "serve/README.md").read_text(), re.MULTILINE
        )
        for number, line in enumerate(lines):
            found[f"{name} readme {number}"] = line
        for manifest in manifests(bundle / "serve"):
            for number, command in enumerate(vllm_commands(manifest)):
                found[f"{name} {manifest['kind']} {number}"] = command
        for size in SIZES if name == "none" else ():
            found[f"split {size}"] = f"serve /model --config /model/serve/vllm.yaml --tensor-parallel-size={size}"
    values = {"$(LWS_LEADER_ADDRESS)": "10.0.0.1", "$(LWS_WORKER_INDEX)": "1", "$LEADER": "10.0.0.1"}
    for place, line in found.items():
        line = re.sub(r"\$\(\(LWS_WORKER_INDEX \* (\d+)\)\)", r"\1", line)
        for variable, value in values.items():
            line = line.replace(variable, value)
        bundle = bundles[place.split()[0]] if place.split()[0] in bundles else bundles["none"]
        found[place] = line.replace("/model", str(bundle))
    return {place: line.split() for place, line in found.items()}


def vllm_commands(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "command" and isinstance(inner, list) and "vllm serve" in " ".join(inner):
                yield " ".join(inner).partition("vllm ")[2]
            else:
                yield from vllm_commands(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from vllm_commands(inner)


@pytest.fixture(scope="module")
def read(commands: dict[str, list[str]]) -> dict[str, Any]:
    """What vLLM makes of all commands, in one process because its import takes long."""
    switches = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [PYTHON, str(ROOT / "tests/vllm_reads.py")],
        input=json.dumps(list(commands.values())),
        env={**os.environ, **switches, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["configured"] = dict(zip(commands, result["configured"], strict=True))
    return result


def test_every_command_is_accepted(read: dict[str, Any], commands: dict[str, list[str]]) -> None:
    places = {place: one for place, one in read["configured"].items() if not place.startswith("split")}
    assert {"one Deployment 0", "copies LeaderWorkerSet 1", "group LeaderWorkerSet 1", "group readme 3"} <= set(places)
    for place, one in places.items():
        # arguments are read before the configuration, which fails where Ray is not installed
        assert "error" not in one or any(part.endswith("=ray") for part in commands[place]), (place, one)
        assert one["name"] == ["smollm2-135m-instruct"]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("none Deployment 0", {"tensor": 1, "copies": 1, "context": CONTEXT, "drain": 60, "tools": None}),
        ("one Deployment 0", {"tensor": 1, "copies": 8, "cache": None, "tools": "hermes"}),
        ("copies LeaderWorkerSet 0", {"copies": 16, "local": 8, "headless": False}),
        ("copies LeaderWorkerSet 1", {"copies": 16, "local": 8, "headless": True}),
        ("group LeaderWorkerSet 0", {"pipeline": 4, "nodes": 4, "headless": False}),
        ("group LeaderWorkerSet 1", {"pipeline": 4, "nodes": 4, "rank": 1, "headless": True}),
        ("group readme 3", {"pipeline": 4, "nodes": 4, "rank": 3, "headless": True}),
    ],
)
def test_the_engine_is_configured_as_planned(read: dict[str, Any], place: str, expected: dict[str, Any]) -> None:
    one = read["configured"][place]
    assert {key: one.get(key) for key in expected} == expected


def test_vllm_splits_the_heads_by_the_same_rule(read: dict[str, Any], bundles: dict[str, Path]) -> None:
    shape = read_shape(bundles["none"])
    refused = {size for size in SIZES if "attention heads" in read["configured"][f"split {size}"].get("error", "")}
    assert refused == {n for n in SIZES if any("attention heads" in one for one in obstacles(shape, n))}
    assert refused


def test_tool_parsers_exist_and_know_the_markers(read: dict[str, Any]) -> None:
    for row in json.loads(PARSERS.read_text(encoding="utf-8")):
        assert row["parser"] in read["parsers"]
        # the sentence of Llama's template, and Markdown's fence, are in no parser
        marks = [marker for marker in row["markers"] if marker.startswith(("<", "["))]
        assert all(marker in read["parsing"] for marker in marks) or row["parser"] == "openai", row


def test_metrics_exist(read: dict[str, Any], bundles: dict[str, Path]) -> None:
    scaling = (bundles["one"] / "serve/kubernetes/autoscaling.yaml").read_text()
    used = set(re.findall(r"vllm:\w+", json.dumps([alert_rules("x", 2, 600), dashboard("x")]) + scaling))
    assert {"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:generation_tokens_total"} <= used
    for metric in used:  # Prometheus' client adds the ends
        assert f'"{re.sub("_(total|bucket)$", "", metric)}"' in read["metrics"], metric
