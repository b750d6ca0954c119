"""What a bundle's folder serve/ says: the model's name for clients, the images that it needs, and its manifests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from tasks.errors import TaskError
from tasks.rollout.record import Form

_COMPOSE_IMAGE = re.compile(r"\$\{([A-Z_]+)_IMAGE:\?[^}]*\}")
_MANIFEST_IMAGE = re.compile(r"\$\{([A-Z_]+)_IMAGE\}")
_DIGEST = re.compile(r"[^\s@=]+@sha256:[0-9a-f]{64}")
COMPOSE, MANIFESTS = Path("serve/compose.yaml"), Path("serve/kubernetes")
NAME_OPTIONS = ("--served-model-name", "--alias", "--name")  # of the servers: the model's name for clients
GROUP_FILE = "leaderworkerset.yaml"
SERVERS = ("deployment.yaml", GROUP_FILE)  # the first that a bundle has


def read_compose(bundle: Path) -> dict[str, Any]:
    """serve/compose.yaml; TaskError if the bundle has none."""
    path = bundle / COMPOSE
    if not path.is_file():
        if (bundle / MANIFESTS).is_dir():
            raise TaskError(f"{bundle} needs several machines, so it has no {COMPOSE}; use --kubernetes")
        raise TaskError(f"{bundle} has no {COMPOSE}: its README in serve/ says why there are no files for servers")
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def read_manifests(bundle: Path) -> dict[str, list[dict[str, Any]]]:
    """The manifests of serve/kubernetes that serving needs, by file; TaskError if the bundle has none."""
    folder = bundle / MANIFESTS
    server = next((name for name in SERVERS if (folder / name).is_file()), None)
    if server is None:
        raise TaskError(f"{bundle} has no {MANIFESTS}, because its server is not for a cluster; leave out --kubernetes")
    return {
        name: list(yaml.safe_load_all((folder / name).read_text(encoding="utf-8")))
        for name in ("common.yaml", server, "monitoring.yaml")
    }


def served_name(bundle: Path, form: Form) -> str:
    """The name by which clients ask for the model; TaskError if the bundle has no files of that form."""
    if form == "kubernetes":
        services = [one for one in read_manifests(bundle)["common.yaml"] if one["kind"] == "Service"]
        return str(services[0]["metadata"]["name"])
    settings = bundle / "serve/vllm.yaml"
    command = [str(word) for word in read_compose(bundle)["services"]["model"].get("command", ())]
    if settings.is_file():
        return str(yaml.safe_load(settings.read_text(encoding="utf-8"))["served-model-name"])
    names = [value for option, value in pairwise(command) if option in NAME_OPTIONS]
    if not names:
        raise TaskError(
            f"{bundle / COMPOSE} does not say the model's name for clients; "
            f"expected one of {', '.join(NAME_OPTIONS)} in the server's command"
        )
    return names[0]


def needed_images(bundle: Path, form: Form) -> list[str]:
    """The images that the bundle's files ask for, such as caddy and vllm."""
    if form == "compose":
        images = [service["image"] for service in read_compose(bundle)["services"].values()]
        found = [match[1] for image in images if (match := _COMPOSE_IMAGE.fullmatch(image))]
    else:
        found = _MANIFEST_IMAGE.findall(str(read_manifests(bundle)))
    return sorted({_name(variable) for variable in found})


def read_images(given: Iterable[str]) -> dict[str, str]:
    """The images of NAME=IMAGE@sha256:... by name; TaskError for another form."""
    found = {}
    for text in given:
        name, _, image = text.partition("=")
        if not _DIGEST.fullmatch(image):
            raise TaskError(f"--image {text}: expected NAME=IMAGE@sha256:..., such as vllm=registry/vllm@sha256:...")
        found[name] = image
    return found


def chosen_images(given: Mapping[str, str], before: Mapping[str, str], needed: Iterable[str]) -> dict[str, str]:
    """The needed images by name: the given ones, else those of before.

    TaskError for one that is missing or not needed.
    """
    wanted = list(needed)
    if unknown := [name for name in given if name not in wanted]:
        raise TaskError(f"--image {unknown[0]}=...: the bundle needs no such image, but {', '.join(wanted)}")
    chosen = {**before, **given}
    if missing := [name for name in wanted if name not in chosen]:
        raise TaskError(f"no image for {missing[0]}; name it by digest: --image {missing[0]}=IMAGE@sha256:...")
    return {name: chosen[name] for name in wanted}


def with_images(value: Any, images: Mapping[str, str]) -> Any:
    """The values of a compose file or manifest with each image in place of its variable."""
    if isinstance(value, dict):
        return {key: with_images(one, images) for key, one in value.items()}
    if isinstance(value, list):
        return [with_images(one, images) for one in value]
    if isinstance(value, str) and (match := _COMPOSE_IMAGE.fullmatch(value) or _MANIFEST_IMAGE.fullmatch(value)):
        return images[_name(match[1])]
    return value


def _name(variable: str) -> str:
    return variable.lower().replace("_", "-")
