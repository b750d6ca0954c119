"""Push an image to a registry and pull it again, by the OCI distribution protocol (oras).

Credentials come from Docker's config.json (`docker login`, credential helpers; DOCKER_CONFIG names another folder), or
from MODELPRESS_REGISTRY_USER and MODELPRESS_REGISTRY_PASSWORD. Only a registry on this machine is reached without TLS.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from olot.oci.oci_common import MediaTypes
from olot.oci.oci_image_manifest import OCIImageManifest
from oras.auth.basic import BasicAuth
from oras.auth.token import TokenAuth
from oras.container import Container
from oras.provider import Registry
from oras.utils import append_url_params
from requests.adapters import HTTPAdapter

from tasks.bundle.oci import blob, checked_blob, read_manifest, write_index
from tasks.bundle.places import SCHEME
from tasks.errors import TaskError, TransientError, first_line

USER, PASSWORD = "MODELPRESS_REGISTRY_USER", "MODELPRESS_REGISTRY_PASSWORD"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_ADDRESS = re.compile(
    rf"(?P<host>[A-Za-z0-9.-]+(?::[0-9]+)?)/(?P<name>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))"
)
_LOCAL = ("localhost", "127.0.0.1")
_BLOCK = 2**20  # bytes to read at a time


def push(layout: Path, address: str) -> str:
    """Upload the image of a layout to `oci://HOST/NAME:TAG`; blobs that the registry has are not sent again.

    Returns the address with the image's digest. TaskError for a damaged layout, an address without a tag or a refusal
    of the registry; TransientError if it is not reached.
    """
    target = _target(address)
    if not target["tag"]:
        raise TaskError(f"{address} names no tag to push to; expected {SCHEME}HOST/NAME:TAG")
    manifest, digest = read_manifest(layout)
    with _registry(address) as (registry, container):
        for one in (*manifest.layers, manifest.config):
            part = {"digest": one.digest, "size": one.size}
            _accepted(registry.upload_blob(str(blob(layout, one.digest)), container, part), address)
        registry.forget()
        headers = {"Content-Type": MediaTypes.manifest}
        url = f"{registry.prefix}://{container.manifest_url()}"
        _accepted(registry.do_request(url, "PUT", data=blob(layout, digest).read_bytes(), headers=headers), address)
    return f"{SCHEME}{target['host']}/{target['name']}@{digest}"


def pull(address: str, layout: Path) -> None:
    """Download the image at `oci://HOST/NAME:TAG` or `...@sha256:DIGEST` as an OCI image layout, an empty folder.

    Every blob is compared with its digest. TaskError if there is no such image or it is not a bundle; TransientError if
    the registry is not reached.
    """
    target = _target(address)
    with _registry(address) as (registry, container):
        headers = {"Accept": MediaTypes.manifest}
        url = f"{registry.prefix}://{container.manifest_url()}"
        answer = _accepted(registry.do_request(url, headers=headers), address)
        digest = f"sha256:{hashlib.sha256(answer.content).hexdigest()}"
        if target["digest"] not in (None, digest):
            raise TaskError(f"{address} gives an image with the digest {digest}; do not use it")
        try:
            manifest = OCIImageManifest.model_validate_json(answer.content)
        except ValueError as error:
            raise TaskError(f"{address} is not an image of a bundle: {first_line(error)}") from error
        blob(layout, digest).parent.mkdir(parents=True)
        blob(layout, digest).write_bytes(answer.content)
        for part in {one.digest for one in (*manifest.layers, manifest.config)}:
            registry.download_blob(container, part, str(blob(layout, part)))
            checked_blob(layout, part)
        write_index(layout, digest, len(answer.content))


class _Registry(Registry):  # type: ignore[misc]
    """oras' client, but blobs are streamed instead of held in memory."""

    # without oras' own retries, which wait for minutes and also repeat refusals; see HTTPAdapter below
    do_request = Registry.do_request.__wrapped__

    def put_upload(self, blob: str, container: Container, layer: dict[str, Any]) -> requests.Response:
        self.forget()
        started: requests.Response = self.do_request(f"{self.prefix}://{container.upload_blob_url()}", "POST")
        if started.status_code != 202:
            return started
        url = append_url_params(self._get_location(started, container), {"digest": layer["digest"]})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(layer["size"])}
        answer: requests.Response = self.do_request(url, "PUT", data=_Blocks(Path(blob)), headers=headers)
        return answer

    def forget(self) -> None:
        """Drop a token: one that was asked for to read does not allow to write, and oras would send it again."""
        if isinstance(self.auth, TokenAuth):
            self.auth.token = None


class _Blocks:
    """The bytes of a file, which can be sent again after a request for authentication."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __len__(self) -> int:
        return self._path.stat().st_size

    def __iter__(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block


@contextmanager
def _registry(address: str) -> Iterator[tuple[_Registry, Container]]:
    """A client for the registry of an address; its errors become one line."""
    target = _target(address)
    logging.getLogger("oras.logger").setLevel(logging.CRITICAL)  # it writes messages of its own
    plain = urlsplit(f"//{target['host']}").hostname in _LOCAL
    try:
        registry = _Registry(insecure=plain, auth_backend=_authentication(target["host"], plain))
        registry.session.mount("https://", HTTPAdapter(max_retries=3))
        container = registry.get_container(address.removeprefix(SCHEME))
        _log_in(registry, container)
        yield registry, container
    except requests.RequestException as error:
        raise TransientError(
            f"{target['host']} was not reached, or broke off: {first_line(error)[:300]}; check address and network"
        ) from error
    except ValueError as error:  # oras, where it finds no way to authenticate
        raise _refused(address, 401) from error


def _authentication(host: str, plain: bool) -> str:
    """The kind of authentication that a registry asks for, in oras' words."""
    answer = requests.get(f"{'http' if plain else 'https'}://{host}/v2/", timeout=30)
    return "basic" if answer.headers.get("Www-Authenticate", "").lower().startswith("basic") else "token"


def _log_in(registry: _Registry, container: Container) -> None:
    """Take credentials from the environment or Docker's configuration; without any, read as anyone may."""
    user, password = os.environ.get(USER), os.environ.get(PASSWORD)
    if user and password:
        registry.auth.set_basic_auth(user, password)
        return
    named = os.environ.get("DOCKER_CONFIG")
    registry.auth.load_configs(container, configs=[str(Path(named) / "config.json")] if named else None)
    if not hasattr(registry.auth, "_basic_auth") and isinstance(registry.auth, BasicAuth):
        registry.auth.set_basic_auth("", "")


def _accepted(answer: requests.Response, address: str) -> requests.Response:
    """`answer` if the registry did what it was asked to; else TaskError or, if it is ill, TransientError."""
    if answer.status_code in (200, 201, 202):
        return answer
    if answer.status_code >= 500 or answer.status_code == 429:
        raise TransientError(f"{address}: the registry answered {answer.status_code} {answer.reason}; try again later")
    raise _refused(address, answer.status_code)


def _refused(address: str, status: int) -> TaskError:
    if status in (401, 403):
        return TaskError(f"{address}: the registry wants credentials; use docker login, or set {USER} and {PASSWORD}")
    if status == 404:
        return TaskError(f"{address}: the registry has no such image; check name and tag")
    return TaskError(f"{address}: the registry refused with status {status}; see its documentation")


def _target(address: str) -> dict[str, Any]:
    """Host, name, and tag or digest of an address. TaskError if it is malformed; a password in it is not repeated."""
    match = _ADDRESS.fullmatch(address.removeprefix(SCHEME))
    if not address.startswith(SCHEME) or match is None:
        shown = re.sub(r"(?<=//).*@(?!sha256:)", "…@", address)
        raise TaskError(f"{shown} is not an address of an image; expected {SCHEME}HOST/NAME:TAG or ...@sha256:DIGEST")
    return match.groupdict()
