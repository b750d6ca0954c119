"""Write the folder serve/ of a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.deployment import compose, kubernetes, onnx
from tasks.deployment.arguments import (
    MODEL,
    PORT,
    llama_cpp_command,
    onnx_arguments,
    onnx_command,
    recommended_sampling,
    vllm_settings,
)
from tasks.deployment.groups import LIFELINE, group_commands, ray_command, server_command
from tasks.deployment.monitoring import ONNX_REQUESTS, VLLM_REQUESTS, alert_rules, dashboard, onnx_alert_rules
from tasks.deployment.pods import PROXY_PORT, USER, environment, secret_name, start_seconds
from tasks.deployment.shape import read_shape
from tasks.deployment.sizing import gigabytes
from tasks.deployment.sizing import plan as plan_of
from tasks.deployment.tool_calling import read_template
from tasks.deployment.yaml_text import to_yaml
from tasks.output import write_json, write_text
from tasks.reporting.engines import why_not_vllm
from tasks.reporting.render import render
from tasks.settings import Settings
from tasks.targets import files_of

TEMPLATES = Path(__file__).parent / "templates"
# what clients may ask for; everything else, such as /metrics or loading an adapter, stays inside
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
ONNX_PATHS = PATHS[:2]


def write_serving(bundle: Path, settings: Settings, target: str, variant: str) -> None:
    """Write `bundle`/serve: settings, manifests and instructions for servers. The same bytes for the same inputs.

    TaskError if the model does not fit the described hardware (package.hardware). For files that vLLM does not load,
    only README.md with the reason.
    """
    folder = bundle / "serve"
    refusal = why_not_vllm(variant, settings.variant(variant)) if files_of(target) == "transformers" else ""
    if refusal:
        write_text(folder / "README.md", _render("README_without.md.j2", name=settings.package.name, refusal=refusal))
        return
    for name, contents in _Serving(bundle, settings, target).files():
        if isinstance(contents, str):
            write_text(folder / name, contents)
        elif name.endswith(".json"):
            write_json(folder / name, contents)
        else:
            write_text(folder / name, to_yaml(contents))


class _Serving:
    """The files for one bundle."""

    def __init__(self, bundle: Path, settings: Settings, target: str) -> None:
        self.name, self.hardware = settings.package.name, settings.package.hardware
        self.target = target
        self.product = self.hardware.gpu if self.hardware and target != "onnx" else None
        self.shape = read_shape(bundle)
        self.plan = (onnx.onnx_plan if target == "onnx" else plan_of)(self.shape, self.hardware)
        self.template = read_template(bundle)
        self.sampling = recommended_sampling(bundle)
        self.paths = ONNX_PATHS if target == "onnx" else PATHS
        self.caddyfile = _render("Caddyfile.j2", port=PROXY_PORT, paths=self.paths, tls=True)

    def files(self) -> Iterator[tuple[str, Any]]:
        """Names below serve/ and contents: text, or values for YAML or JSON."""
        if not self.plan.grouped:
            yield from self._one_machine()
        yield "Caddyfile", self.caddyfile
        if self.target == "onnx":
            yield from self._for_onnx()
        elif self.target != "gguf":
            yield from self._for_vllm()
        values: dict[str, Any] = {
            "name": self.name,
            "hardware": self.hardware,
            "shape": self.shape,
            "plan": self.plan,
            "chat_template": self.template,
            "sampling": self.sampling,
            "llama_cpp": self.target == "gguf",
            "image_variable": {"gguf": "LLAMA_CPP_IMAGE", "onnx": "ONNX_SERVER_IMAGE"}.get(self.target, "VLLM_IMAGE"),
            "paths": self.paths,
            "ports": {"api": PROXY_PORT, "webui": compose.WEBUI_PORT},
            "user": USER,
            "gigabytes": gigabytes,
        }
        if self.target == "onnx":
            values["arguments"] = onnx_arguments(self.name, self.plan)
            yield "README.md", _render("README_onnx.md.j2", **values)
        else:
            values |= {"commands": group_commands(self.plan, "$LEADER"), "ray": ray_command(self.plan)}
            values["start_seconds"] = start_seconds(self.plan)
            yield "README.md", _render("README.md.j2", **values)

    def _one_machine(self) -> Iterator[tuple[str, Any]]:
        calls = self.template.parser is not None
        if self.target == "gguf":
            command = llama_cpp_command(self.name, self.plan, self.sampling, gpu=self.product is not None)
            part, calls = compose.llama_cpp(command), self.template.tools
        elif self.target == "onnx":
            part, calls = compose.onnx(onnx_command(self.name, self.plan), onnx.ENVIRONMENT), False
        else:
            part = compose.vllm(self.plan)
        yield "compose.yaml", compose.compose(self.plan, self.product is not None, part)
        if self.template.chat:
            yield "compose.webui.yaml", compose.compose_webui(calls)
            yield "webui.caddy", _render("webui.caddy.j2", port=compose.WEBUI_PORT)

    def _for_vllm(self) -> Iterator[tuple[str, Any]]:
        name, plan, product = self.name, self.plan, self.product
        alerts = alert_rules(name, plan.engines, start_seconds(plan))
        yield "vllm.yaml", vllm_settings(name, plan, self.template, product is not None)
        yield "Dockerfile", _render("Dockerfile.j2", **self._image())
        yield "kubernetes/common.yaml", kubernetes.common(name, self.caddyfile, plan)
        if not plan.grouped:
            inside = _render("Caddyfile.j2", port=kubernetes.KSERVE_PORT, paths=PATHS, tls=False)
            yield "kubernetes/deployment.yaml", [kubernetes.deployment(name, plan, product)]
            yield "kubernetes/kserve.yaml", kubernetes.inference_service(name, plan, product, inside)
        if plan.joined or plan.copies > 1:
            yield LIFELINE.name, LIFELINE.read_text(encoding="utf-8")
        if plan.joined:
            yield "kubernetes/leaderworkerset.yaml", [kubernetes.leader_worker_set(name, plan, product)]
        yield "kubernetes/autoscaling.yaml", [kubernetes.autoscaling(name, plan, VLLM_REQUESTS)]
        yield "kubernetes/monitoring.yaml", kubernetes.monitoring(name, alerts)
        yield "monitoring/alerts.yaml", alerts
        yield "monitoring/dashboard.json", dashboard(name)

    def _for_onnx(self) -> Iterator[tuple[str, Any]]:
        name, plan = self.name, self.plan
        yield from onnx.server_files()
        yield "Dockerfile", _render("Dockerfile_onnx.j2", **onnx.image_values(name, plan))
        # a policy for servers that are independent of one another
        yield "kubernetes/common.yaml", kubernetes.common(name, self.caddyfile, replace(plan, machines=1))
        yield "kubernetes/deployment.yaml", [kubernetes.deployment(name, plan, None, **onnx.container(name, plan))]
        yield "kubernetes/autoscaling.yaml", [kubernetes.autoscaling(name, plan, ONNX_REQUESTS)]
        alerts = onnx_alert_rules(name, plan.engines, start_seconds(plan))
        # the server gives its metrics only for the key
        endpoint = {
            "authorization": {"type": "Bearer", "credentials": secret_name(name)},
            "relabelings": [{"targetLabel": "model_name", "replacement": name}],
        }
        yield "kubernetes/monitoring.yaml", kubernetes.monitoring(name, alerts, **endpoint)

    def _image(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": MODEL,
            "environment": environment(self.plan),
            "user": USER,
            "port": PORT,
            "command": server_command(self.plan),
        }


def _render(template: str, **values: Any) -> str:
    return render(template, escape=False, folder=TEMPLATES, **values)
