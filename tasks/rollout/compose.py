"""The compose file of a deployment, and its proxy's configuration: an engine for each version behind one proxy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.deployment.compose import MACHINE
from tasks.deployment.yaml_text import to_yaml
from tasks.errors import TaskError
from tasks.rollout.bundles import read_compose, with_images
from tasks.rollout.record import Deployment, Version

_TO_ONE = "reverse_proxy {$UPSTREAM}"
# a version that does not answer gets no requests until it does; the other one gets them
_TO_TWO = """reverse_proxy {{
\t\tto {addresses}
\t\tlb_policy weighted_round_robin {weights}
\t\tlb_try_duration 5s
\t\tfail_duration 10s
\t\thealth_uri /health
\t\thealth_interval 5s
\t\thealth_timeout 5s
\t}}"""

Bundle = Callable[[Version], Path]


def compose_files(deployment: Deployment, bundle: Bundle) -> dict[str, str]:
    """Names and texts of compose.yaml and Caddyfile. bundle: where a version's files are."""
    stable = deployment.stable
    parts = {version.run: read_compose(bundle(version)) for version in deployment.versions}
    whole = with_images(parts[stable.run], stable.images)
    proxy = whole["services"]["proxy"]
    port = proxy["environment"].pop("UPSTREAM").rpartition(":")[2]
    weights = {f"{_service(version)}:{port}": version.weight for version in deployment.versions}
    caddyfile = balanced(bundle(stable) / "serve/Caddyfile", weights)
    # compose sees no change inside of a mounted file, but it starts a service with another label again
    proxy["labels"] = {"modelpress.caddyfile": hashlib.sha256(caddyfile.encode()).hexdigest()}
    proxy["depends_on"] = {_service(stable): {"condition": "service_healthy"}}
    engines = {_service(version): _engine(version, parts[version.run]) for version in deployment.versions}
    _check_gpus(whole, engines)
    return {
        "compose.yaml": to_yaml({**whole, "services": {**engines, "proxy": proxy}}),
        "Caddyfile": caddyfile,
    }


def balanced(path: Path, weights: dict[str, int]) -> str:
    """The proxy's configuration in a bundle with these upstreams. weights: percent of the requests, by address.

    TaskError if the configuration has no place for them.
    """
    text = path.read_text(encoding="utf-8")
    if _TO_ONE not in text:
        raise TaskError(f"{path} has no line {_TO_ONE!r}, so requests cannot be shared; package it again")
    if len(weights) == 1:
        return text.replace(_TO_ONE, f"reverse_proxy {next(iter(weights))}")
    common = math.gcd(*weights.values())
    shares = " ".join(str(weight // common) for weight in weights.values())
    return text.replace(_TO_ONE, _TO_TWO.format(addresses=" ".join(weights), weights=shares))


def _service(version: Version) -> str:
    return f"model-{version.name}"


def _engine(version: Version, parts: dict[str, Any]) -> dict[str, Any]:
    """A version's engine. It must not depend on the weights: compose would load the model again."""
    engine: dict[str, Any] = with_images(parts["services"]["model"], version.images)
    for volume in engine["volumes"]:
        if volume["source"] == "..":
            volume["source"] = f"./{version.folder}"
    for device in _devices(engine):
        count = device.pop("count")  # would give both versions the same ones
        # the first ones of the machine, or the last ones, so that neither depends on the other version
        start = _gpus(parts, 2 * count) - count if version.slot else 0
        device["device_ids"] = [str(number) for number in range(start, start + count)]
    return engine


def _check_gpus(parts: dict[str, Any], engines: dict[str, dict[str, Any]]) -> None:
    """TaskError if two versions would share GPUs. parts: the file of the first of them."""
    ids = [[number for device in _devices(engine) for number in device["device_ids"]] for engine in engines.values()]
    if len(ids) == 2 and set(ids[0]) & set(ids[1]):
        used, needed = map(len, ids)
        raise TaskError(
            f"a canary needs {needed} free GPUs, but the machine has {_gpus(parts, used)} and the other version uses "
            f"{used}; leave out --canary, or use --kubernetes"
        )


def _devices(engine: dict[str, Any]) -> list[dict[str, Any]]:
    return list(engine.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", ()))


def _gpus(parts: dict[str, Any], unknown: int) -> int:
    """GPUs of the machine that a bundle is for; `unknown` if its file does not say it."""
    return int(parts.get(MACHINE, {}).get("gpus", unknown))
