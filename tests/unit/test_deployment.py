"""The folder serve/ of a bundle: valid for the programs that read it, guarded, and the same bytes every time."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec.models import ComposeSpecification

from tasks.deployment import lifeline
from tasks.deployment.arguments import recommended_sampling
from tasks.deployment.shape import Shape
from tasks.deployment.sizing import GB, GIB
from tasks.deployment.tool_calling import read_template
from tasks.deployment.write import write_serving
from tasks.errors import TaskError
from tasks.output import checksums
from tasks.serving.onnx_server.metrics import Metrics
from tasks.serving.onnx_server.options import KEY_VARIABLE, read_options
from tasks.settings import check_settings
from tests.caddy import FIRST, KEY, SECOND, backend, caddy, needs_caddy
from tests.crds import faults
from tests.unit.test_sizing import LARGE

GPU = "NVIDIA-H100-80GB-HBM3"
HARDWARE: dict[str, dict[str, Any] | None] = {
    "none": None,
    "processors": {"memory": 256, "machines": 2},
    "one": {"gpu": GPU, "memory": 80, "cards": 8},
    "copies": {"gpu": GPU, "memory": 80, "cards": 8, "machines": 2},
    "group": {"gpu": GPU, "memory": 18, "cards": 1, "machines": 4},
}
VARIABLES = {
    "VLLM_IMAGE": "vllm@sha256:" + "0" * 64,
    "ONNX_SERVER_IMAGE": "onnx-server@sha256:" + "0" * 64,
    "CADDY_IMAGE": "caddy@sha256:" + "0" * 64,
    "MONITORING_NAMESPACE": "monitoring",
    "MAX_REPLICAS": "4",
    "PROMETHEUS_URL": "http://prometheus.monitoring:9090",
}
WITH_TOOLS = "{% for tool in tools %}<tool_call>{{ tool | tojson }}</tool_call>{% endfor %}"
KSERVE_FIELDS = {"minReplicas", "maxReplicas", "timeout", "deploymentStrategy"}  # beside those of a pod
TARGETS = ("transformers", "gguf", "onnx")
NAME = "smollm2-135m-instruct"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write serve/ for a large model; returns that folder."""

    def make(
        hardware: str = "one",
        target: str = "transformers",
        chat: str | None = "{{ messages }}",
        shape: Shape = LARGE,
        **files: Any,
    ) -> Path:
        bundle = tmp_path / f"{hardware}-{target}-{len(list(tmp_path.iterdir()))}"
        bundle.mkdir()
        if chat is not None:
            (bundle / "chat_template.jinja").write_text(chat)
        for name, values in files.items():
            (bundle / f"{name}.json").write_text(json.dumps(values))
        monkeypatch.setattr("tasks.deployment.write.read_shape", lambda _: shape)
        params = yaml.safe_load(Path("params.yaml").read_text())
        params["targets"] = [target]
        params["package"]["hardware"] = HARDWARE[hardware]
        write_serving(bundle, check_settings(params), target, "awq-int4")
        return bundle / "serve"

    return make


def manifests(folder: Path) -> Iterator[dict[str, Any]]:
    """All Kubernetes manifests, with the variables set."""
    for path in sorted((folder / "kubernetes").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        for name, value in VARIABLES.items():
            text = text.replace(f"${{{name}}}", value)
        assert "${" not in text.replace("{$", "")
        yield from yaml.safe_load_all(text)


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification in a manifest."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["containers"], *pod.get("initContainers", [])]


class TestSchemas:
    @pytest.mark.parametrize("hardware", HARDWARE)
    def test_kubernetes(self, write: Write, hardware: str) -> None:
        kinds = set()
        for manifest in manifests(write(hardware)):
            kinds.add(manifest["kind"])
            if manifest["apiVersion"] in ("v1", "apps/v1", "networking.k8s.io/v1"):
                kubernetes_validate.validate(manifest, "1.37", strict=True)
                continue
            for pod in pods(manifest):
                spec = {k: v for k, v in pod.items() if k not in KSERVE_FIELDS}
                whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
                kubernetes_validate.validate(whole, "1.37", strict=True)
        assert {"ConfigMap", "Service", "NetworkPolicy", "ScaledObject", "PodMonitor", "PrometheusRule"} <= kinds
        assert ("Deployment" in kinds) == ("InferenceService" in kinds) == (hardware != "group")
        assert ("LeaderWorkerSet" in kinds) == (hardware in ("processors", "copies", "group"))

    @pytest.mark.parametrize("hardware", HARDWARE)
    def test_kubernetes_for_onnx(self, write: Write, hardware: str) -> None:
        kinds = {}
        for manifest in manifests(write(hardware, "onnx")):
            kinds[manifest["kind"]] = manifest
            errors = faults(manifest)
            if errors is None:
                kubernetes_validate.validate(manifest, "1.37", strict=True)
            assert not errors
        assert set(kinds) == {
            *("ConfigMap", "Service", "NetworkPolicy", "Deployment"),
            *("ScaledObject", "PodMonitor", "PrometheusRule"),
        }
        assert kinds["Deployment"]["spec"]["replicas"] == (2 if hardware == "processors" else 1)

    @pytest.mark.parametrize("hardware", HARDWARE)
    def test_kinds_of_other_projects(self, write: Write, hardware: str) -> None:
        found = [faults(manifest) for manifest in manifests(write(hardware))]
        checked = [errors for errors in found if errors is not None]
        assert len(checked) >= 4
        assert not any(checked)

    def test_a_misspelled_field_is_found(self, write: Write) -> None:
        (group,) = [m for m in manifests(write("group")) if m["kind"] == "LeaderWorkerSet"]
        group["spec"]["leaderWorkerTemplate"]["restartPolicies"] = "All"
        assert faults(group) == [
            "['spec', 'leaderWorkerTemplate']: Additional properties are not allowed ('restartPolicies' was unexpected)"
        ]

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("hardware", ["none", "one"])
    def test_compose(self, write: Write, hardware: str, target: str) -> None:
        folder = write(hardware, target)
        files = sorted(folder.glob("compose*.yaml"))
        assert [path.name for path in files] == ["compose.webui.yaml", "compose.yaml"]
        for path in files:
            ComposeSpecification.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))

    @pytest.mark.parametrize("target", ["transformers", "onnx"])
    def test_dockerfile(self, write: Write, target: str) -> None:
        linter = shutil.which("hadolint", path=str(Path(yaml.__file__).parents[4] / "bin")) or shutil.which("hadolint")
        assert linter
        done = subprocess.run([linter, str(write(target=target) / "Dockerfile")], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "")


class TestAccess:
    @pytest.mark.parametrize(
        ("hardware", "target"), [*((one, "transformers") for one in HARDWARE), ("none", "gguf"), ("processors", "onnx")]
    )
    def test_every_container_is_confined_and_the_model_is_read_only(
        self, write: Write, hardware: str, target: str
    ) -> None:
        folder = write(hardware, target)
        found = [pod for manifest in manifests(folder) for pod in pods(manifest)]
        assert bool(found) == (target != "gguf")
        for pod in found:
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["runAsUser"] > 0
            assert not pod["enableServiceLinks"]
            for container in containers(pod):
                rights = container["securityContext"]
                assert rights["readOnlyRootFilesystem"]
                assert not rights["allowPrivilegeEscalation"]
                assert rights["capabilities"]["drop"] == ["ALL"]
                mounts = {mount["name"]: mount.get("readOnly") for mount in container["volumeMounts"]}
                assert mounts.get("model", True)
        if hardware != "group":
            for service in yaml.safe_load((folder / "compose.yaml").read_text())["services"].values():
                assert service["user"] == "10001:10001"
                assert service["read_only"]
                assert service["cap_drop"] == ["ALL"]
            (model, *_) = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["model"]["volumes"]
            assert (model["source"], model["read_only"]) == ("..", True)

    @pytest.mark.parametrize(
        ("target", "base", "engine"),
        [
            ("transformers", "VLLM_IMAGE", "VLLM_IMAGE"),
            ("onnx", "PYTHON_IMAGE", "ONNX_SERVER_IMAGE"),
        ],
    )
    def test_images_and_secrets_have_no_default(self, write: Write, target: str, base: str, engine: str) -> None:
        folder = write(target=target)
        for name in ("compose.yaml", "compose.webui.yaml"):
            for service in yaml.safe_load((folder / name).read_text())["services"].values():
                if name == "compose.yaml" or "environment" in service:
                    assert re.fullmatch(r"\$\{[A-Z_]+:\?.*\}", service["image"])
                for key, value in service.get("environment", {}).items():
                    assert not key.endswith("KEY") or re.fullmatch(r"\$\{[A-Z_]+:\?.*\}", value)
        for path in (folder / "kubernetes").glob("*.yaml"):
            assert set(re.findall(r"image: (.*)", path.read_text())) <= {f"${{{engine}}}", "${CADDY_IMAGE}"}
        text = (folder / "Dockerfile").read_text()
        assert re.search(rf"ARG {base}\nFROM \$\{{{base}\}}(?: AS server)?\n", text)
        assert "USER 10001:10001\n" in text
        assert "KEY" not in text

    def test_every_server_asks_for_the_key_itself(self, write: Write) -> None:
        for target, variable in (
            ("transformers", "VLLM_API_KEY"),
            ("gguf", "LLAMA_API_KEY"),
            ("onnx", KEY_VARIABLE),
        ):
            folder = write("none", target)
            environment = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["model"]["environment"]
            assert environment[variable].startswith("${API_KEY:?")
            for container in [
                c
                for m in manifests(folder)
                if m["kind"] == "Deployment"
                for c in m["spec"]["template"]["spec"]["containers"]
            ]:
                (value,) = [one["valueFrom"] for one in container["env"] if one["name"] == variable]
                assert value == {"secretKeyRef": {"name": f"{NAME}-api-key", "key": "api-key"}}
        (monitor,) = [m["spec"] for m in manifests(folder) if m["kind"] == "PodMonitor"]
        (endpoint,) = monitor["podMetricsEndpoints"]
        assert endpoint["authorization"]["credentials"] == {"name": f"{NAME}-api-key", "key": "api-key"}

    def test_the_onnx_server_is_reached_through_the_proxy_only(self, write: Write) -> None:
        folder = write("processors", "onnx")
        model = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["model"]
        assert (model["networks"], "ports" in model) == (["inside"], False)
        (policy,) = [m["spec"] for m in manifests(folder) if m["kind"] == "NetworkPolicy"]
        assert policy["egress"] == []
        assert [port["port"] for rule in policy["ingress"] if "from" not in rule for port in rule["ports"]] == [8443]
        assert "/v1/responses" not in (folder / "Caddyfile").read_text()

    def test_the_server_is_reached_through_the_proxy_only(self, write: Write) -> None:
        folder = write("copies")
        parts = yaml.safe_load((folder / "compose.yaml").read_text())
        assert parts["networks"]["inside"] == {"internal": True}
        assert parts["services"]["model"]["networks"] == ["inside"]
        assert "ports" not in parts["services"]["model"]
        policies = [m["spec"] for m in manifests(folder) if m["kind"] == "NetworkPolicy"]
        for policy in policies:
            assert policy["policyTypes"] == ["Ingress", "Egress"]
            open_to_all = [rule for rule in policy["ingress"] if "from" not in rule]
            assert [port["port"] for rule in open_to_all for port in rule["ports"]] in ([8443], [8080])
        assert policies[0]["ingress"][-1]["from"] == [{"podSelector": policies[0]["podSelector"]}]
        alone = [m["spec"] for m in manifests(write("one")) if m["kind"] == "NetworkPolicy"]
        assert [policy["egress"] for policy in alone] == [[], []]

    @needs_caddy
    def test_the_proxy_wants_the_key_on_every_path(self, write: Write, tmp_path: Path) -> None:
        text = (write() / "Caddyfile").read_text()
        with backend() as (upstream, asked), caddy(text, tmp_path, UPSTREAM=upstream) as ask:
            for path in ("/health", "/v1/models", "/v1/chat/completions", "/metrics", "/", "/v1/load_lora_adapter"):
                assert ask(path) == 401
                assert ask(path, "secre") == 401
                assert ask(path, "secret2") == 401
                assert ask(path, "") == 401
            assert not asked
            assert ask("/health", KEY) == 200
            assert ask("/v1/models", KEY) == 200
            assert ask("/v1/chat/completions", KEY, b"{}") == 200
            assert asked == ["GET /v1/models", "POST /v1/chat/completions"]
            for path in ("/metrics", "/", "/docs", "/v1/models/x", "/v1/load_lora_adapter", "/v1/../metrics", "/load"):
                assert ask(path, KEY) == 404
                assert ask(path, KEY, b"{}") == 404
            assert len(asked) == 2


class TestLife:
    @needs_caddy
    def test_a_proxy_that_ends_passes_on_the_answers_that_are_running(self, write: Write, tmp_path: Path) -> None:
        text = (write() / "Caddyfile").read_text()
        with backend(pause=2) as (upstream, _), caddy(text, tmp_path, UPSTREAM=upstream) as proxy:
            with proxy.open("/v1/chat/completions", KEY, b"{}") as answer:
                assert answer.readline() == FIRST[:-1]  # streamed
                proxy.process.terminate()
                assert answer.read() == b"\n" + SECOND
            assert proxy.process.wait(10) == 0
        parts = yaml.safe_load((write() / "compose.yaml").read_text())["services"]
        drain = yaml.safe_load((write() / "vllm.yaml").read_text())["shutdown-timeout"]
        for service in parts.values():  # compose ends the proxy before the server
            assert int(service["stop_grace_period"].removesuffix("s")) > drain

    def test_requests_are_answered_before_a_pod_ends(self, write: Write) -> None:
        for pod in [pod for manifest in manifests(write("copies")) for pod in pods(manifest)]:
            drain = yaml.safe_load((write("copies") / "vllm.yaml").read_text())["shutdown-timeout"]
            (engine,) = [c for c in pod["containers"] if "shm" in {m["name"] for m in c["volumeMounts"]}]
            assert engine["lifecycle"]["preStop"]["sleep"]["seconds"] + drain < pod["terminationGracePeriodSeconds"]
            probes = {"startupProbe", "livenessProbe", "readinessProbe"}
            assert engine.keys() & probes == (set() if "--headless" in " ".join(engine["command"]) else probes)
            assert "resources" in engine
            guards = [c for c in containers(pod) if "caddy" in c["command"]]
            for guard in guards:  # it outlives the engine
                waits = guard.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
                assert guard.get("restartPolicy") == "Always" or waits > drain

    def test_all_machines_of_a_group_start_again_together(self, write: Write) -> None:
        for hardware, size, replicas in (("group", 4, 1), ("copies", 2, 1)):
            (group,) = [m["spec"] for m in manifests(write(hardware)) if m["kind"] == "LeaderWorkerSet"]
            template = group["leaderWorkerTemplate"]
            assert (template["size"], group["replicas"]) == (size, replicas)
            assert template["restartPolicy"] == "RecreateGroupAfterStart"
            (worker,) = template["workerTemplate"]["spec"]["containers"]
            assert "--headless" in " ".join(worker["command"])
            (leader,) = template["leaderTemplate"]["spec"]["containers"]
            (guard,) = template["leaderTemplate"]["spec"]["initContainers"]
            assert "readinessProbe" in guard
            assert "livenessProbe" not in guard  # its new start would be one of the group
            assert "--headless" not in leader["command"]
            for container, rank in ((leader, "0"), (worker, "$(LWS_WORKER_INDEX)")):
                assert container["command"][:2] == ["python3", "/model/serve/lifeline.py"]
                assert (f"--rank={rank}", f"--size={size}") == tuple(container["command"][4:6])

    @pytest.mark.parametrize(("hardware", "size"), [("processors", 2), ("copies", 2), ("group", 4)])
    def test_the_commands_of_a_group_are_those_of_lifeline(self, write: Write, hardware: str, size: int) -> None:
        folder = write(hardware)
        assert (folder / "lifeline.py").read_bytes() == Path(lifeline.__file__).read_bytes()
        lines = re.findall(
            r"^python3 /model/serve/lifeline.py (.*)   # machine", (folder / "README.md").read_text(), re.M
        )
        (group,) = [m["spec"]["leaderWorkerTemplate"] for m in manifests(folder) if m["kind"] == "LeaderWorkerSet"]
        commands = [shlex.split(line) for line in lines]
        for name, rank in (("leaderTemplate", "0"), ("workerTemplate", "1")):
            (container,) = group[name]["spec"]["containers"]
            commands.append([word.replace("$(LWS_WORKER_INDEX)", rank) for word in container["command"][2:]])
        options = [lifeline.read_options(command) for command in commands]
        assert [one.rank for one in options] == [*range(size), 0, 1]
        assert {(one.port, one.size) for one in options} == {(13344, size)}
        assert {one.leader for one in options} == {"$LEADER", "$(LWS_LEADER_ADDRESS)"}
        assert {one.command[0] for one in options} <= {"vllm", "sh"}
        for one in options:  # everything may last as long as it can
            longest = one.drain + 3 * one.grace
            for name in ("leaderTemplate", "workerTemplate"):
                spec = group[name]["spec"]
                waits = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
                assert waits + longest < spec["terminationGracePeriodSeconds"]
                assert waits < one.linger

    def test_a_server_for_itself_needs_no_lifeline(self, write: Write) -> None:
        for hardware, target in (("none", "transformers"), ("copies", "gguf"), ("processors", "onnx")):
            folder = write(hardware, target)
            assert not (folder / "lifeline.py").exists()
            assert "lifeline" not in (folder / "README.md").read_text()

    def test_several_copies_on_a_machine_are_waited_for(self, write: Write) -> None:
        folder = write("one")  # one copy on each of its cards
        found = [
            container["command"]
            for manifest in manifests(folder)
            for pod in pods(manifest)
            for container in containers(pod)
            if "serve" in container["command"]
        ]
        model = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["model"]
        found.append([*model["entrypoint"], *model["command"]])
        (entry,) = re.findall("^ENTRYPOINT (.*)", (folder / "Dockerfile").read_text(), re.M)
        found.append(json.loads(entry))
        assert len(found) == 4  # deployment, KServe, compose, image
        for command in found:
            assert command[:2] == ["python3", "/model/serve/lifeline.py"]
            options = lifeline.read_options(command[2:])
            assert (options.size, options.metrics, options.host) == (1, 8000, "127.0.0.1")
            assert options.command[:3] == ["vllm", "serve", "/model"]
            assert options.answers + 20 < float(model["stop_grace_period"].removesuffix("s"))

    @pytest.mark.parametrize("hardware", ["processors", "copies", "group"])
    def test_a_group_has_a_service_of_its_own(self, write: Write, hardware: str) -> None:
        found = list(manifests(write(hardware)))
        (group,) = [m for m in found if m["kind"] == "LeaderWorkerSet"]
        services = [m["metadata"]["name"] for m in found if m["kind"] == "Service"]
        assert group["metadata"]["name"] not in services  # LeaderWorkerSet makes one of this name
        # a StatefulSet's name and the hash of its revision are a label
        assert len(f"{'x' * 40}{group['metadata']['name'].removeprefix(NAME)}-1024") <= 52
        (scaled,) = [m["spec"]["scaleTargetRef"] for m in found if m["kind"] == "ScaledObject"]
        targets = [(m["apiVersion"], m["kind"], m["metadata"]["name"]) for m in found]
        assert (scaled["apiVersion"], scaled["kind"], scaled["name"]) in targets

    @pytest.mark.parametrize("hardware", HARDWARE)
    def test_vllm_waits_for_its_copies_as_long_as_the_probe(self, write: Write, hardware: str) -> None:
        folder, variable = write(hardware), "VLLM_ENGINE_READY_TIMEOUT_S"
        waits = []
        for container in [c for m in manifests(folder) for pod in pods(m) for c in pod["containers"]]:
            found = {one["name"]: one.get("value") for one in container["env"]}
            if probe := container.get("startupProbe"):
                waits.append(int(str(found[variable])))
                assert 0 <= probe["periodSeconds"] * probe["failureThreshold"] - waits[0] < 10
            elif "caddy" not in container["command"]:
                waits.append(int(str(found[variable])))
        assert len(set(waits)) == 1
        assert f"{variable}={waits[0]}" in (folder / "Dockerfile").read_text()
        readme = (folder / "README.md").read_text()
        assert (f"`{variable}` to {waits[0]}" in readme) == (hardware in ("processors", "copies", "group"))
        if hardware != "group":
            environment = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["model"]["environment"]
            assert environment[variable] == str(waits[0])

    def test_experts_are_spread_over_the_machines(self, write: Write) -> None:
        mixture, spread = replace(LARGE, experts=8, layer_bytes=10 * GB), "--enable-expert-parallel"
        folder = write("processors", shape=mixture)  # one copy on each machine
        assert "enable-expert-parallel" not in yaml.safe_load((folder / "vllm.yaml").read_text())
        (group,) = [m for m in manifests(folder) if m["kind"] == "LeaderWorkerSet"]
        assert all(spread in " ".join(pod["containers"][0]["command"]) for pod in pods(group))
        assert (folder / "README.md").read_text().count(spread) == 3  # two machines, and Ray
        assert spread not in (write("processors") / "README.md").read_text()
        assert yaml.safe_load((write("copies", shape=mixture) / "vllm.yaml").read_text())["enable-expert-parallel"]

    def test_machines_that_cannot_share_the_experts_stay_apart(self, write: Write) -> None:
        folder = write("processors", shape=replace(LARGE, experts=9))
        assert not (folder / "lifeline.py").exists()
        kinds = {m["kind"] for m in manifests(folder)}
        assert "LeaderWorkerSet" not in kinds
        assert "Deployment" in kinds
        readme = (folder / "README.md").read_text()
        assert "the 9 experts cannot be spread evenly over 2 machines" in readme
        assert "leaderworkerset" not in readme
        assert "--data-parallel" not in readme

    def test_the_page_cache_counts_toward_the_limit_on_a_cpu(self, write: Write) -> None:
        for target, cached in (("transformers", 40), ("onnx", 0)):
            (pod, *_) = [pod for m in manifests(write("processors", target)) for pod in pods(m)]
            resources = pod["containers"][0]["resources"]
            sizes = [int(resources[key]["memory"].removesuffix("Gi")) for key in ("requests", "limits")]
            assert (sizes[1] - sizes[0]) * GIB == pytest.approx(cached * GB, abs=GIB)

    def test_pods_go_to_the_described_gpus(self, write: Write) -> None:
        for pod in [pod for manifest in manifests(write("one")) for pod in pods(manifest)]:
            assert pod["nodeSelector"] == {"nvidia.com/gpu.product": GPU}
            assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
            assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        for pod in [pod for manifest in manifests(write("processors")) for pod in pods(manifest)]:
            assert "tolerations" not in pod


class TestOperation:
    @pytest.mark.parametrize(
        ("hardware", "target", "servers", "threshold"),
        [
            ("copies", "transformers", 2, 0.8 * 4),
            ("processors", "transformers", 2, 0.8),
            ("group", "transformers", 1, 0.8),
            ("processors", "onnx", 2, 0.8),
        ],
    )
    def test_a_server_is_added_when_the_others_are_busy(
        self, write: Write, hardware: str, target: str, servers: int, threshold: float
    ) -> None:
        folder = write(hardware, target)
        found = list(manifests(folder))
        (scaled,) = [m["spec"] for m in found if m["kind"] == "ScaledObject"]
        (server,) = [m for m in found if (m["kind"], m["metadata"]["name"]) == scaled_kind_and_name(scaled)]
        assert scaled["minReplicaCount"] == server["spec"]["replicas"] == servers
        metrics, (trigger,) = {"vllm:num", "onnx_server"}, scaled["triggers"]
        counted = re.findall(r"sum\((\S+)_requests_(\w+)\{model_name=", trigger["metadata"]["query"])
        assert [kind for _, kind in counted] == ["running", "waiting"]
        assert {prefix for prefix, _ in counted} < metrics
        if target == "onnx":
            command = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["model"]["command"]
            sequences = read_options(command).max_batch
        else:
            sequences = yaml.safe_load((folder / "vllm.yaml").read_text())["max-num-seqs"]
        assert trigger["metadata"]["threshold"] == str(round(threshold * sequences))
        assert f"`MAX_REPLICAS`, at least {servers}," in (folder / "README.md").read_text()

    def test_kserve_is_monitored_and_does_not_cut_requests(self, write: Write) -> None:
        folder = write("copies")
        found = list(yaml.safe_load_all((folder / "kubernetes/kserve.yaml").read_text()))
        (service,) = [m for m in found if m["kind"] == "InferenceService"]
        predictor = service["spec"]["predictor"]
        assert predictor["timeout"] >= 3600
        assert predictor["deploymentStrategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
        (monitor,) = [m["spec"] for m in found if m["kind"] == "PodMonitor"]
        assert monitor["selector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": NAME}
        (port,) = [one["port"] for one in monitor["podMetricsEndpoints"]]
        assert port in {one["name"] for c in predictor["containers"] for one in c["ports"]}
        names = [m["metadata"]["name"] for m in manifests(folder) if m["kind"] == "PodMonitor"]
        assert len(names) == len(set(names)) == 2

    def test_names_are_looked_up_wherever_the_clusters_dns_is(self, write: Write) -> None:
        (policy,) = [m["spec"] for m in manifests(write("group")) if m["kind"] == "NetworkPolicy"]
        (lookups,) = [rule["ports"] for rule in policy["egress"] if "to" not in rule]
        assert {(one["protocol"], one["port"]) for one in lookups} == {
            *(("UDP", 53), ("TCP", 53)),
            *(("UDP", 5353), ("TCP", 5353)),
        }

    @pytest.mark.parametrize(
        ("hardware", "target", "engines"),
        [("copies", "transformers", 8), ("processors", "onnx", 2), ("group", "transformers", None)],
    )
    def test_a_lost_copy_is_noticed(self, write: Write, hardware: str, target: str, engines: int | None) -> None:
        rules = [m["spec"] for m in manifests(write(hardware, target)) if m["kind"] == "PrometheusRule"]
        found = [rule for rule in rules[0]["groups"][0]["rules"] if rule["alert"] == "ModelCopiesLost"]
        assert [int(rule["expr"].rpartition(" < ")[2]) for rule in found] == ([engines] if engines else [])


def scaled_kind_and_name(scaled: dict[str, Any]) -> tuple[str, str]:
    return scaled["scaleTargetRef"]["kind"], scaled["scaleTargetRef"]["name"]


class TestSampling:
    def test_what_the_source_recommends_is_said(self, write: Write, tmp_path: Path) -> None:
        folder = write(generation_config={"temperature": 0.6, "top_p": 0.95, "eos_token_id": 2})
        assert "The publisher recommends temperature 0.6, top_p 0.95." in (folder / "README.md").read_text()
        assert recommended_sampling(folder.parent) == {"temperature": 0.6, "top_p": 0.95}

    def test_nothing_is_invented(self, write: Write) -> None:
        for files in ({}, {"generation_config": {"eos_token_id": 2}}):
            text = (write(**files) / "README.md").read_text()
            assert "The publisher recommends nothing" in text

    def test_llama_cpp_gets_them_as_arguments(self, write: Write) -> None:
        folder = write("none", "gguf", generation_config={"temperature": 0.6, "repetition_penalty": 1.1})
        command = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["model"]["command"]
        assert command[-4:] == ["--temp", "0.6", "--repeat-penalty", "1.1"]


class TestToolCalling:
    @pytest.mark.parametrize(
        ("chat", "parser"),
        [
            ("{{ messages }}", None),
            (WITH_TOOLS, "hermes"),
            ("{{ tools }}<tool_call>\n<function=name>", "qwen3_coder"),
            ("{{ tools }}[TOOL_CALLS]", "mistral"),
            ("{{ tools }}<tool_call>name<arg_key>", "glm45"),
            ("{{ tools }}an unknown form", None),
            ("no <tool_call> without the list", None),
        ],
    )
    def test_the_parser_follows_the_template(self, write: Write, chat: str, parser: str | None) -> None:
        folder = write(chat=chat)
        settings = yaml.safe_load((folder / "vllm.yaml").read_text())
        assert (settings.get("tool-call-parser"), settings.get("enable-auto-tool-choice")) == (parser, parser and True)
        webui = yaml.safe_load((folder / "compose.webui.yaml").read_text())["services"]["webui"]["environment"]
        assert ("DEFAULT_MODEL_METADATA" in webui) == (parser is None)
        if parser is None:
            assert json.loads(webui["DEFAULT_MODEL_METADATA"]) == {"capabilities": {"builtin_tools": False}}

    @pytest.mark.parametrize(("target", "calls"), [("transformers", True), ("gguf", True), ("onnx", False)])
    def test_open_webui_sends_tools_only_to_who_reads_calls(self, write: Write, target: str, calls: bool) -> None:
        folder = write("none", target, chat=WITH_TOOLS)
        webui = yaml.safe_load((folder / "compose.webui.yaml").read_text())["services"]["webui"]["environment"]
        assert ("DEFAULT_MODEL_PARAMS" not in webui) == calls
        assert ("refuses requests with `tools`" not in (folder / "README.md").read_text()) == calls

    def test_a_template_in_the_tokenizers_file(self, tmp_path: Path) -> None:
        named = [{"name": "default", "template": WITH_TOOLS}, {"name": "other", "template": ""}]
        for value in (WITH_TOOLS, named):
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
            assert read_template(tmp_path).parser == "hermes"

    @pytest.mark.parametrize("target", TARGETS)
    def test_without_a_chat_template_there_is_no_chat(self, write: Write, target: str) -> None:
        folder = write("none", target, chat=None)
        assert not (folder / "compose.webui.yaml").exists()
        assert "clients can use `/v1/completions` only" in (folder / "README.md").read_text()


class TestFiles:
    @pytest.mark.parametrize("target", TARGETS)
    def test_the_same_inputs_give_the_same_bytes(self, write: Write, target: str) -> None:
        one, two = write("none", target), write("none", target)
        assert checksums(one) == checksums(two)
        for path in one.rglob("*"):
            assert path.is_dir() or str(one.parent) not in path.read_text()

    def test_every_file_is_in_the_readme(self, write: Write) -> None:
        for hardware in HARDWARE:
            folder = write(hardware, chat=WITH_TOOLS)
            text = (folder / "README.md").read_text()
            assert_named(folder, text)
        for hardware in HARDWARE:
            folder = write(hardware, "onnx", chat=WITH_TOOLS)
            assert_named(folder, (folder / "README.md").read_text())

    @pytest.mark.parametrize(("target", "other"), [("transformers", "ONNX_SERVER_IMAGE"), ("onnx", "VLLM_IMAGE")])
    def test_variables_of_the_readme_are_those_of_the_manifests(self, write: Write, target: str, other: str) -> None:
        folder = write("copies", target)
        (names,) = re.findall(r"names='(.*)'", (folder / "README.md").read_text())
        used = {
            v for path in (folder / "kubernetes").glob("*") for v in re.findall(r"\$\{([A-Z_]+)\}", path.read_text())
        }
        assert {Template(name).template.lstrip("$") for name in names.split()} == used == set(VARIABLES) - {other}

    def test_onnx_brings_its_server(self, write: Write) -> None:
        folder = write("none", "onnx") / "onnx_server"
        source = Path("tasks/serving/onnx_server")
        sources = {path.name: path for path in source.glob("*.py")} | {"requirements.txt": Path("locks/onnx.lock")}
        assert set(sources) == {path.name for path in folder.iterdir()}
        for path in folder.iterdir():
            assert path.read_bytes() == sources[path.name].read_bytes()

    @pytest.mark.parametrize(("hardware", "batch"), [("none", 12), ("processors", 16), ("one", 12)])
    def test_the_arguments_for_onnx_are_those_of_the_server(self, write: Write, hardware: str, batch: int) -> None:
        folder = write(hardware, "onnx")
        command = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["model"]["command"]
        found = read_options(command)
        assert (found.name, found.model, found.host, found.max_batch) == (NAME, Path("/model"), "0.0.0.0", batch)
        assert found.max_model_len is not None
        assert found.max_model_len * LARGE.kv_token <= found.kv_cache
        (server,) = [
            m["spec"]["template"]["spec"]["containers"][0] for m in manifests(folder) if m["kind"] == "Deployment"
        ]
        assert server["command"] == ["python", "-m", "onnx_server", *command]
        lines = (folder / "Dockerfile").read_text().splitlines()
        (entry,) = [line.removeprefix("ENTRYPOINT ") for line in lines if line.startswith("ENTRYPOINT")]
        (given,) = [line.removeprefix("CMD ") for line in lines if line.startswith("CMD")]
        assert [*json.loads(entry), *json.loads(given)] == server["command"]

    def test_requests_are_answered_before_the_onnx_server_is_killed(self, write: Write) -> None:
        folder = write("none", "onnx")
        service = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["model"]
        drain = read_options(service["command"]).drain
        assert int(service["stop_grace_period"].removesuffix("s")) > drain + 5  # it may close connections for 5 s
        (pod,) = [pod for m in manifests(folder) for pod in pods(m)]
        waits = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert waits + drain + 5 < pod["terminationGracePeriodSeconds"]

    def test_described_gpus_are_not_for_onnx(self, write: Write) -> None:
        folder = write("one", "onnx")
        assert "describes GPUs, but this export is for CPUs" in (folder / "README.md").read_text()
        assert "deploy" not in yaml.safe_load((folder / "compose.yaml").read_text())["services"]["model"]
        for pod in [pod for manifest in manifests(folder) for pod in pods(manifest)]:
            assert "nvidia" not in json.dumps(pod)

    def test_metrics_of_the_onnx_server(self, write: Write) -> None:
        folder = write("none", "onnx")
        queries = [
            *re.findall(r"expr: (.*)", (folder / "kubernetes/monitoring.yaml").read_text()),
            *re.findall(r"query: (.*)", (folder / "kubernetes/autoscaling.yaml").read_text()),
        ]
        asked = {name for query in queries for name in re.findall(r"onnx_server_\w+", query)}
        registry = Metrics(os.getpid()).registry
        given = {
            end
            for metric in registry.collect()
            for end in (metric.name, f"{metric.name}_total", f"{metric.name}_bucket")
        }
        assert len(queries) == 5
        assert asked
        assert asked <= given

    def test_what_vllm_does_not_load_gets_no_server(self, tmp_path: Path) -> None:
        params = yaml.safe_load(Path("params.yaml").read_text())
        params["variants"]["auto"]["fused"] = False
        write_serving(tmp_path, check_settings(params), "vllm", "auto")
        assert [path.name for path in (tmp_path / "serve").iterdir()] == ["README.md"]
        assert "`variants.auto.fused: true`" in (tmp_path / "serve/README.md").read_text()


def assert_named(folder: Path, text: str) -> None:
    """The README has every file, but for those inside of the folder of a server, and no other."""
    paths = [path for path in folder.rglob("*.*") if path.parent.name != "onnx_server"]
    for path in paths:
        assert path.name in text or path.name in ("webui.caddy", "README.md"), path
    named = set(re.findall(r"`(?:kubernetes/|monitoring/)?([a-z.]+\.(?:yaml|json|caddy))`", text))
    assert named <= {path.name for path in paths} | {"params.yaml"}
    assert (folder / "onnx_server").is_dir() == ("`onnx_server/`" in text)


def test_hardware_settings_are_checked() -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    for hardware, message in (
        ({"memory": 80, "cards": 2}, "cards is 2, but gpu is null"),
        ({"gpu": "H100 80 GB", "memory": 80}, "package.hardware.gpu is 'H100 80 GB'"),
        ({"gpu": "H100", "memory": 0}, "package.hardware.memory is 0"),
        ({"gpu": "H100"}, "package.hardware.memory is missing"),
        ({"gpu": "H100", "memory": 80, "machines": 0}, "package.hardware.machines is 0"),
    ):
        params["package"]["hardware"] = hardware
        with pytest.raises(TaskError, match=re.escape(message)):
            check_settings(params)
