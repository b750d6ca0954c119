"""Push, pull and verify against a real registry, and the commands of modelpress for a bundle."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import yaml

from flows.server.ephemeral import free_port
from tasks.bundle.__main__ import main
from tasks.bundle.signing import KEY
from tasks.output import checksums
from tests.bundles import key_pair, small_bundle
from tests.waiting import soon

PROJECT = Path(__file__).resolve().parents[2]
REGISTRY = shutil.which("docker-registry") or shutil.which("registry")
USER, PASSWORD = "press", "let me in"
HASHED = "$2b$04$0XpFTGTJoWd1dRKTk/cwfe7SREl48fGt6bBnnz37IxvDZ4H9kucAy"  # of PASSWORD, by bcrypt

needs_registry = pytest.mark.skipif(REGISTRY is None, reason="needs docker-registry: apt install docker-registry")


Run = Callable[..., tuple[int, str]]


@contextmanager
def registry(folder: Path, private: bool = False) -> Iterator[str]:
    """The host of a running registry that keeps its blobs in `folder`."""
    folder.mkdir()
    host = f"127.0.0.1:{free_port()}"
    settings = {
        "version": "0.1",
        "storage": {"filesystem": {"rootdirectory": str(folder / "blobs")}},
        "http": {"addr": host},
    }
    if private:
        (folder / "users").write_text(f"{USER}:{HASHED}\n")
        settings["auth"] = {"htpasswd": {"realm": "a realm", "path": str(folder / "users")}}
    (folder / "settings.yml").write_text(yaml.safe_dump(settings))

    def answers() -> bool:
        try:
            return requests.get(f"http://{host}/v2/", timeout=1).status_code in (200, 401)
        except requests.ConnectionError:
            return False

    with (folder / "log").open("w") as log:
        process = subprocess.Popen([str(REGISTRY), "serve", str(folder / "settings.yml")], stdout=log, stderr=log)
        try:
            assert soon(answers, 20), (folder / "log").read_text()
            yield host
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "bundle", large=20_000_000)


@pytest.fixture
def modelpress(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run the command line in an empty folder, without the user's own credentials."""
    home = tmp_path / "home"
    home.mkdir()

    def run(*arguments: object, **environment: str) -> tuple[int, str]:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("MODELPRESS_", "DOCKER_"))}
        command = [sys.executable, "-c", "from flows.cli import main; main()", *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=home,
            env={**own, "PYTHONPATH": str(PROJECT), "HOME": str(home), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the commands in this process, which is quicker."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bundle", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            status, error = (1, f"{end.code}\n") if isinstance(end.code, str) else (int(end.code or 0), "")
            return status, error + capsys.readouterr().err
        return 0, capsys.readouterr().out

    return run


@needs_registry
def test_a_bundle_travels_through_a_registry(
    tmp_path: Path, bundle: Path, program: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = key_pair(tmp_path, "signing")
    _, other = key_pair(tmp_path, "other")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv(KEY, str(private))
    assert program("sign", bundle)[0] == 0
    with registry(tmp_path / "registry") as host:
        address = f"oci://{host}/team/small:v1"
        status, said = program("push", bundle, address)
        assert status == 0, said
        by_digest = said.strip()
        assert by_digest.startswith(f"oci://{host}/team/small@sha256:")
        assert program("oci", bundle, "--to", tmp_path / "layout")[0] == 0
        # equal bundles give equal images, also by way of a layout
        assert program("push", tmp_path / "layout", f"oci://{host}/team/small:v2") == (0, said)
        for number, source in enumerate((address, by_digest)):
            target = tmp_path / f"pulled-{number}"
            status, said = program("pull", source, "--to", target, "--key", public)
            assert (status, said.count("is a signature of")) == (0, 1), said
            assert checksums(target) == checksums(bundle)
        assert program("verify", address, "--key", public)[0] == 0
        for command in (["verify", address], ["pull", address, "--to", tmp_path / "wrong"]):
            status, said = program(*command, "--key", other)
            assert (status, said.count("it was made with another key")) == (1, 1), said
        status, said = program("pull", f"oci://{host}/team/small:v3", "--to", tmp_path / "wrong")
        assert (status, said.count("the registry has no such image")) == (1, 1), said
        damage(tmp_path / "registry/blobs")
        status, said = program("pull", address, "--to", tmp_path / "wrong")
        assert (status, said.count("is changed; fetch the image again")) == (1, 1), said
    status, said = program("pull", address, "--to", tmp_path / "wrong")
    assert (status, said.count("was not reached")) == (75, 1), said
    expected = {"bundle", "layout", "pulled-0", "pulled-1", "registry"}
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == expected


def damage(blobs: Path) -> None:
    """Flip a bit in the largest blob."""
    largest = max((p for p in blobs.rglob("data") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


@needs_registry
def test_credentials_come_from_dockers_configuration_or_the_environment(
    tmp_path: Path, bundle: Path, modelpress: Run
) -> None:
    with registry(tmp_path / "registry", private=True) as host:
        docker = tmp_path / "docker"
        docker.mkdir()
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        (docker / "config.json").write_text(json.dumps({"auths": {host: {"auth": login}}}))
        in_environment = {"MODELPRESS_REGISTRY_USER": USER, "MODELPRESS_REGISTRY_PASSWORD": PASSWORD}
        address = f"oci://{host}/small:v1"
        for credentials in ({}, {**in_environment, "MODELPRESS_REGISTRY_PASSWORD": "a guess"}):
            status, said = modelpress("push", bundle, address, **credentials)
            assert (status, said.count("the registry wants credentials")) == (1, 1), said
            assert "a guess" not in said
        status, said = modelpress("push", bundle, address, DOCKER_CONFIG=str(docker))
        assert (status, login in said) == (0, False), said
        status, said = modelpress("pull", address, "--to", tmp_path / "pulled", **in_environment)
        assert (status, PASSWORD in said) == (0, False), said
        assert checksums(tmp_path / "pulled") == checksums(bundle)


def test_verify_ends_with_the_status_of_what_it_found(tmp_path: Path, bundle: Path, modelpress: Run) -> None:
    status, said = modelpress("verify", bundle)
    assert (status, said.count("nobody signed these files")) == (0, 1)
    (bundle / "serve/more.yaml").touch()
    status, said = modelpress("verify", bundle)
    assert (status, said) == (
        1,
        f"error: {bundle} does not match its SHA256SUMS: serve/more.yaml was added. Do not use it; fetch it again from "
        "where it was published\n",
    )


def test_an_output_of_dvc_is_not_signed(tmp_path: Path, modelpress: Run) -> None:
    bundle = small_bundle(tmp_path / "dist/small")
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {"package": {"outs": [{"path": "dist/small"}]}}}))
    private, _ = key_pair(tmp_path, "signing")
    status, said = modelpress("sign", bundle, MODELPRESS_SIGNING_KEY=str(private))
    assert (status, said.count("is an output of DVC")) == (1, 1), said
    assert not (bundle / "model.sig").exists()
    copy = shutil.copytree(bundle, tmp_path / "copy")
    assert modelpress("sign", copy, MODELPRESS_SIGNING_KEY=str(private)) == (0, f"{copy / 'model.sig'}\n")
