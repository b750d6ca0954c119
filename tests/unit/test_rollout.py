"""A deployment's versions: how they change, and the compose files, proxies and manifests that share the requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec.models import ComposeSpecification

from tasks.errors import TaskError
from tasks.output import checksums
from tasks.rollout.bundles import chosen_images, needed_images, read_images, served_name
from tasks.rollout.compose import balanced
from tasks.rollout.kubernetes import steps
from tasks.rollout.record import Deployment, Place, Version, read_record
from tasks.rollout.write import write_deployment
from tests.caddy import KEY, backend, caddy, free_port, needs_caddy
from tests.crds import faults
from tests.unit.test_deployment import Write, containers, pods, write
from tests.unit.test_sizing import LARGE

__all__ = ["write"]  # a fixture

IMAGES = {"vllm": "vllm@sha256:" + "0" * 64, "caddy": "caddy@sha256:" + "1" * 64}
NEWER = IMAGES | {"vllm": "vllm@sha256:" + "2" * 64}
CLUSTER = Place("kubernetes", "infra/public", "models.example.org", "monitoring")
NAME = "smollm2-135m-instruct"
HALF = replace(LARGE, experts=4)  # takes 4 of 8 GPUs, because more do not divide the experts


def first(place: Place | None = None) -> Deployment:
    return Deployment(NAME, place or Place("compose"), (Version("run/a", 100, IMAGES),))


def shares(deployment: Deployment) -> dict[str, int]:
    return {version.name: version.weight for version in deployment.versions}


class TestChanges:
    def test_a_version_replaces_another_and_goes_back(self) -> None:
        second = first().all_to("run/b", NEWER)
        assert shares(second) == {"b": 100}
        assert second.previous == first().stable
        assert [version.run for version in second.retired] == ["run/a"]
        again = second.back()
        assert (again.versions, again.previous) == (first().versions, None)
        assert [version.run for version in again.retired] == ["run/b"]
        with pytest.raises(TaskError, match=r"^there is no version before run/a to go back to; name one"):
            again.back()

    def test_a_canary_is_widened_and_promoted_without_a_new_start(self) -> None:
        tried = first().try_out("run/b", NEWER, 10)
        assert shares(tried) == {"a": 90, "b": 10}
        assert [version.slot for version in tried.versions] == [0, 1]
        wider = tried.try_out("run/b", NEWER, 50)
        assert shares(wider) == {"a": 50, "b": 50}
        promoted = wider.all_to("run/b", NEWER)
        assert (shares(promoted), promoted.stable.slot) == ({"b": 100}, 1)
        assert promoted.previous == first().stable
        assert [version.slot for version in promoted.try_out("run/c", NEWER, 5).versions] == [1, 0]

    def test_a_canary_is_taken_back(self) -> None:
        tried = first().try_out("run/b", NEWER, 10)
        for ended in (tried.back(), tried.all_to("run/a", IMAGES)):
            assert (ended.versions, ended.previous) == (first().versions, None)
            assert [version.run for version in ended.retired] == ["run/b"]
        other = tried.try_out("run/c", NEWER, 20)
        assert (shares(other), [version.run for version in other.retired]) == ({"a": 80, "c": 20}, ["run/b"])

    def test_the_same_change_again_changes_nothing(self) -> None:
        second = first().all_to("run/b", NEWER)
        assert second.all_to("run/b", NEWER) is second
        tried = second.try_out("run/c", NEWER, 10)
        assert tried.try_out("run/c", NEWER, 10) is tried
        other = second.all_to("run/b", IMAGES)  # another image
        assert (other.versions[0].images, other.previous, other.retired) == (IMAGES, second.previous, ())

    def test_a_version_is_no_canary_of_itself(self) -> None:
        with pytest.raises(TaskError, match="run/a is the version that has the other requests"):
            first().try_out("run/a", IMAGES, 10)

    def test_the_record_is_read_back(self, tmp_path: Path) -> None:
        assert read_record(tmp_path / "new") is None
        tried = first(CLUSTER).try_out("run/b", NEWER, 10)
        (tmp_path / "deployment.json").write_text(json.dumps(tried, default=vars))
        assert read_record(tmp_path) == tried

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"served": "x", "place": {"form": "swarm"}, "versions": []}'])
    def test_another_record_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "deployment.json").write_text(text)
        with pytest.raises(TaskError, match=r"deployment\.json is not the record of a deployment \("):
            read_record(tmp_path)

    def test_another_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(TaskError, match=r"holds thesis\.tex and no deployment\.json"):
            read_record(tmp_path)
        with pytest.raises(TaskError, match=r"thesis\.tex is a file"):
            read_record(tmp_path / "thesis.tex")


class TestImages:
    def test_those_of_before_are_kept(self) -> None:
        assert chosen_images({}, IMAGES, ["caddy", "vllm"]) == IMAGES
        given = read_images([f"vllm={NEWER['vllm']}"])
        assert chosen_images(given, IMAGES, ["caddy", "vllm"]) == NEWER

    @pytest.mark.parametrize("text", ["vllm:latest", "vllm=vllm/vllm-openai:v0.32.0", "vllm=vllm@sha256:12", ""])
    def test_one_without_a_digest_is_refused(self, text: str) -> None:
        with pytest.raises(TaskError, match=rf"^--image {text}: expected NAME=IMAGE@sha256"):
            read_images([text])

    def test_all_that_are_needed_must_be_known(self) -> None:
        with pytest.raises(TaskError, match="no image for vllm; name it by digest: --image vllm=IMAGE@sha256:"):
            chosen_images({"caddy": IMAGES["caddy"]}, {}, ["caddy", "vllm"])
        with pytest.raises(TaskError, match="the bundle needs no such image, but caddy, vllm"):
            chosen_images({"nginx": IMAGES["caddy"]}, IMAGES, ["caddy", "vllm"])

    def test_a_bundle_says_which_it_needs(self, write: Write) -> None:
        vllm, llama, onnx = write("one").parent, write("none", "gguf").parent, write("none", "onnx").parent
        assert needed_images(vllm, "compose") == needed_images(vllm, "kubernetes") == ["caddy", "vllm"]
        assert needed_images(llama, "compose") == ["caddy", "llama-cpp"]
        assert needed_images(onnx, "compose") == needed_images(onnx, "kubernetes") == ["caddy", "onnx-server"]
        assert served_name(vllm, "compose") == served_name(vllm, "kubernetes") == served_name(llama, "compose") == NAME
        assert served_name(onnx, "compose") == served_name(onnx, "kubernetes") == NAME

    def test_a_server_that_does_not_say_the_models_name_is_refused(self, write: Write) -> None:
        folder = write("none", "onnx")
        text = (folder / "compose.yaml").read_text()
        (folder / "compose.yaml").write_text(text.replace("--served-model-name", "--title"))
        with pytest.raises(TaskError, match=r"expected one of --served-model-name, --alias, --name in the server's"):
            served_name(folder.parent, "compose")

    def test_a_bundle_without_such_files_is_refused(self, write: Write, tmp_path: Path) -> None:
        with pytest.raises(TaskError, match=r"needs several machines, so it has no serve/compose\.yaml"):
            served_name(write("group").parent, "compose")
        with pytest.raises(TaskError, match="because its server is not for a cluster; leave out --kubernetes"):
            served_name(write("none", "gguf").parent, "kubernetes")
        with pytest.raises(TaskError, match="its README in serve/ says why"):
            served_name(tmp_path, "compose")


def devices(folder: Path) -> dict[str, list[str]]:
    """The GPUs of each engine in a compose file."""
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    return {
        name: service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for name, service in services.items()
        if "deploy" in service
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "live"


def bring(folder: Path, bundle: Path, *names: str) -> None:
    for name in names:
        shutil.copytree(bundle, folder / "versions" / name)


class TestCompose:
    @pytest.mark.parametrize(
        ("hardware", "target"),
        [("none", "transformers"), ("none", "gguf"), ("none", "onnx"), ("one", "onnx")],
    )
    def test_an_engine_for_each_version_behind_one_proxy(
        self, write: Write, folder: Path, hardware: str, target: str
    ) -> None:
        bring(folder, write(hardware, target).parent, "a", "b")
        images = IMAGES | {"llama-cpp": IMAGES["vllm"], "onnx-server": IMAGES["vllm"]}
        start = Deployment(NAME, Place("compose"), (Version("run/a", 100, images),))
        write_deployment(folder, start.try_out("run/b", images | NEWER, 10))
        parts = yaml.safe_load((folder / "compose.yaml").read_text())
        ComposeSpecification.model_validate(parts)
        assert list(parts["services"]) == ["model-a", "model-b", "proxy"]
        for name in ("a", "b"):
            engine = parts["services"][f"model-{name}"]
            assert engine["volumes"][0]["source"] == f"./versions/{name}"
            assert (folder / engine["volumes"][0]["source"] / "serve").is_dir()
            assert "networks" in engine
            assert "ports" not in engine
        assert "${" not in str([service["image"] for service in parts["services"].values()])
        assert parts["services"]["proxy"]["depends_on"] == {"model-a": {"condition": "service_healthy"}}

    def test_a_canary_takes_gpus_that_are_free(self, write: Write, folder: Path) -> None:
        bring(folder, write("one", shape=HALF).parent, "a", "b")
        tried = first().try_out("run/b", NEWER, 10)
        write_deployment(folder, tried)
        assert devices(folder) == {"model-a": ["0", "1", "2", "3"], "model-b": ["4", "5", "6", "7"]}
        write_deployment(folder, tried.all_to("run/b", NEWER))
        assert devices(folder) == {"model-b": ["4", "5", "6", "7"]}

    def test_a_canary_without_free_gpus_is_refused(self, write: Write, folder: Path) -> None:
        bring(folder, write("one").parent, "a")
        bring(folder, write("one", shape=HALF).parent, "b")
        write_deployment(folder, first())
        before = checksums(folder)
        words = (
            r"^a canary needs 4 free GPUs, but the machine has 8 and the other version uses 8; leave out --canary, "
            r"or use --kubernetes$"
        )
        with pytest.raises(TaskError, match=words):
            write_deployment(folder, first().try_out("run/b", NEWER, 10))
        assert checksums(folder) == before
        write_deployment(folder, first().all_to("run/b", NEWER))
        assert devices(folder) == {"model-b": ["0", "1", "2", "3"]}

    def test_a_bundle_that_does_not_say_the_machines_gpus(self, write: Write, folder: Path) -> None:
        bring(folder, write("one", shape=HALF).parent, "a", "b")
        for path in folder.glob("versions/*/serve/compose.yaml"):
            path.write_text(path.read_text().replace("x-machine", "x-other"))
        write_deployment(folder, first().try_out("run/b", NEWER, 10))
        assert devices(folder)["model-b"] == ["4", "5", "6", "7"]

    def test_other_weights_start_only_the_proxy_again(self, write: Write, folder: Path) -> None:
        bring(folder, write("one", shape=HALF).parent, "a", "b")
        seen = []
        tried = first().try_out("run/b", NEWER, 10)
        for one in (first(), tried, tried.try_out("run/b", NEWER, 50), tried.all_to("run/b", NEWER)):
            write_deployment(folder, one)
            seen.append(yaml.safe_load((folder / "compose.yaml").read_text())["services"])
        assert seen[0]["model-a"] == seen[1]["model-a"] == seen[2]["model-a"]
        assert seen[1]["model-b"] == seen[2]["model-b"] == seen[3]["model-b"]
        assert len({json.dumps(services["proxy"]) for services in seen}) == 4

    def test_going_back_gives_the_bytes_of_before(self, write: Write, folder: Path) -> None:
        bring(folder, write("one").parent, "a", "b")
        write_deployment(folder, first())
        before = checksums(folder)
        write_deployment(folder, first())
        assert checksums(folder) == before
        second = first().all_to("run/b", NEWER)
        write_deployment(folder, second)
        write_deployment(folder, second.back())
        after = checksums(folder)
        assert {name for name in before if before[name] != after[name]} == {"deployment.json"}

    @needs_caddy
    def test_the_proxy_shares_the_requests_by_weight(self, write: Write, tmp_path: Path) -> None:
        caddyfile = write() / "Caddyfile"
        with backend() as (old, asked_old), backend() as (new, asked_new):
            with caddy(balanced(caddyfile, {old: 90, new: 10}), tmp_path) as ask:
                assert {ask("/v1/chat/completions", KEY, b"{}") for _ in range(200)} == {200}
                assert ask("/v1/chat/completions", "stranger", b"{}") == 401
            assert (len(asked_old), len(asked_new)) == (180, 20)

    @needs_caddy
    def test_requests_of_a_canary_that_is_away_go_to_the_other(self, write: Write, tmp_path: Path) -> None:
        caddyfile = write() / "Caddyfile"
        with backend() as (old, asked):
            weights = {old: 50, f"127.0.0.1:{free_port()}": 50}
            with caddy(balanced(caddyfile, weights), tmp_path) as ask:
                assert {ask("/v1/chat/completions", KEY, b"{}") for _ in range(40)} == {200}
            assert len(asked) == 40

    def test_another_proxy_configuration_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "Caddyfile").write_text(":8443 { reverse_proxy model:8000 }")
        with pytest.raises(TaskError, match=r"has no line 'reverse_proxy \{\$UPSTREAM\}'"):
            balanced(tmp_path / "Caddyfile", {"a:8000": 100})


class TestKubernetes:
    @pytest.mark.parametrize("hardware", ["none", "one", "copies", "group"])
    def test_the_manifests_are_valid(self, write: Write, folder: Path, hardware: str) -> None:
        bring(folder, write(hardware).parent, "a", "b")
        write_deployment(folder, first(CLUSTER).try_out("run/b", NEWER, 10))
        checked = 0
        for manifest in read(folder / "kubernetes"):
            errors = faults(manifest)
            if errors is None:
                kubernetes_validate.validate(manifest, "1.37", strict=True)
            assert not errors
            checked += 1
        assert checked == 2 * 6 + 2

    def test_for_onnx(self, write: Write, folder: Path) -> None:
        bring(folder, write("processors", "onnx").parent, "a", "b")
        images = {"caddy": IMAGES["caddy"], "onnx-server": IMAGES["vllm"]}
        start = Deployment(NAME, CLUSTER, (Version("run/a", 100, images),))
        write_deployment(folder, start.try_out("run/b", images, 10))
        found = list(read(folder / "kubernetes"))
        for manifest in found:
            errors = faults(manifest)
            if errors is None:
                kubernetes_validate.validate(manifest, "1.37", strict=True)
            assert not errors
        assert len(found) == 2 * 6 + 2
        used = {container["image"] for manifest in found for pod in pods(manifest) for container in containers(pod)}
        assert used == set(images.values())

    @pytest.mark.parametrize("hardware", ["one", "group"])
    def test_versions_do_not_meet(self, write: Write, folder: Path, hardware: str) -> None:
        bring(folder, write(hardware).parent, "a", "b")
        write_deployment(folder, first(CLUSTER).try_out("run/b", NEWER, 10))
        objects = [(one["kind"], one["metadata"]["name"]) for one in read(folder / "kubernetes")]
        assert len(objects) == len(set(objects))
        for name, images in (("a", IMAGES), ("b", NEWER)):
            own = f"{NAME}-{name}"
            manifests = list(read(folder / "kubernetes" / name))
            assert all(one["metadata"]["name"].startswith(own) for one in manifests)
            labels = {"app": own, "role": "server"}
            (service,) = [one for one in manifests if one["kind"] == "Service"]
            assert service["spec"]["selector"] == labels
            (policy,) = [one["spec"] for one in manifests if one["kind"] == "NetworkPolicy"]
            assert policy["podSelector"] == {"matchLabels": {"app": own}}
            (server,) = [one for one in manifests if one["kind"] in ("Deployment", "LeaderWorkerSet")]
            template = server["spec"].get("template") or server["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
            assert template["metadata"]["labels"] == labels
            for pod in pods(server):
                volumes = {volume["name"]: volume for volume in pod["volumes"]}
                assert volumes["model"]["persistentVolumeClaim"]["claimName"] == own
                if "proxy" in volumes:
                    assert ("ConfigMap", volumes["proxy"]["configMap"]["name"]) in objects
                    assert volumes["tls"]["secret"]["secretName"] == f"{NAME}-tls"  # shared
                assert {container["image"] for container in containers(pod)} <= set(images.values())
        assert "${" not in "".join(path.read_text() for path in (folder / "kubernetes").rglob("*.yaml"))

    def test_the_route_has_the_weights(self, write: Write, folder: Path) -> None:
        bring(folder, write("one").parent, "a", "b")
        tried = first(CLUSTER).try_out("run/b", NEWER, 10)
        write_deployment(folder, tried)
        route, policy = read(folder / "kubernetes/route.yaml")
        assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "infra"}]
        assert route["spec"]["hostnames"] == ["models.example.org"]
        services = {f"{NAME}-a": 90, f"{NAME}-b": 10}
        backends = route["spec"]["rules"][0]["backendRefs"]
        assert {one["name"]: one["weight"] for one in backends} == services
        assert [one["name"] for one in policy["spec"]["targetRefs"]] == list(services)
        objects = {(one["kind"], one["metadata"]["name"]) for one in read(folder / "kubernetes")}
        assert all(("Service", name) in objects for name in services)

        write_deployment(folder, tried.all_to("run/b", NEWER))
        assert sorted(path.name for path in (folder / "kubernetes").iterdir()) == ["b", "route.yaml"]
        assert [path.name for path in (folder / "retired").iterdir()] == ["a"]
        route, _ = read(folder / "kubernetes/route.yaml")
        assert [one["weight"] for one in route["spec"]["rules"][0]["backendRefs"]] == [100]

    @pytest.mark.parametrize(
        ("hardware", "ready"),
        [
            ("one", f"kubectl rollout status deployment/{NAME}-b"),
            ("group", f"kubectl wait --for condition=Available --timeout 2h leaderworkerset/{NAME}-b-group"),
        ],
    )
    def test_the_route_moves_when_the_new_version_is_ready(
        self, write: Write, folder: Path, hardware: str, ready: str
    ) -> None:
        bring(folder, write(hardware).parent, "a", "b")

        def commands(deployment: Deployment) -> list[str]:
            write_deployment(folder, deployment)
            return steps(folder, deployment, lambda version: folder / version.folder)

        files = folder / "kubernetes"
        route, again = f"kubectl apply --filename {files}/route.yaml", "as many free GPUs, or as much memory, again"
        alone = commands(first(CLUSTER))
        assert alone[0] == f"kubectl apply --recursive --filename {files}/a"
        assert (len(alone), alone[2]) == (3, route)
        tried = first(CLUSTER).try_out("run/b", NEWER, 10)
        applied, *rest = commands(tried)
        assert applied.startswith(f"kubectl apply --recursive --filename {files}/a --filename {files}/b    # beside")
        assert applied.endswith(again)
        assert rest == [ready, route]
        *_, deleted = commands(tried.all_to("run/b", NEWER))
        assert deleted == f"kubectl delete --recursive --filename {folder}/retired"
        for manifest in [one for path in files.glob("*/*.yaml") for one in read(path)]:  # what is waited for is there
            if manifest["kind"] in ("Deployment", "LeaderWorkerSet"):
                assert f"{manifest['kind'].lower()}/{manifest['metadata']['name']}" in ready

    def test_a_group_has_a_shorter_name(self, write: Write, folder: Path) -> None:
        fits, name = "a-run-of-this-length", "a-run-of-such-a-length"
        bring(folder, write("group").parent, fits, name)
        write_deployment(folder, Deployment(NAME, CLUSTER, (Version(f"run/{fits}", 100, IMAGES),)))
        (group,) = [one for one in read(folder / "kubernetes") if one["kind"] == "LeaderWorkerSet"]
        assert group["metadata"]["name"] == f"{NAME}-{fits}-group"
        with pytest.raises(TaskError, match="has 44 characters, and names in a cluster can have 42 here"):
            write_deployment(folder, Deployment(NAME, CLUSTER, (Version(f"run/{name}", 100, IMAGES),)))

    def test_a_name_that_is_too_long_is_refused_before_anything_is_written(self, write: Write, folder: Path) -> None:
        name = "a-run-with-a-name-that-is-long-enough"
        bring(folder, write("one").parent, name)
        with pytest.raises(
            TaskError, match=r"has 59 characters, and names in a cluster can have 52 here; choose a shorter"
        ):
            write_deployment(folder, Deployment(NAME, CLUSTER, (Version(f"run/{name}", 100, IMAGES),)))
        assert [path.name for path in folder.iterdir()] == ["versions"]


def read(place: Path) -> Iterator[dict[str, Any]]:
    """The manifests of a file, or of all files of a folder."""
    for path in sorted(place.rglob("*.yaml")) if place.is_dir() else [place]:
        yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))
