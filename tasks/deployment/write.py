"""Write the folder serve/ of a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.deployment import compose, kubernetes
from tasks.deployment.arguments import (
    MODEL,
    PORT,
    copies_arguments,
    group_arguments,
    llama_cpp_command,
    recommended_sampling,
    vllm_command,
    vllm_settings,
)
from tasks.deployment.monitoring import alert_rules, dashboard
from tasks.deployment.pods import ENVIRONMENT, PROXY_PORT, USER
from tasks.deployment.shape import read_shape
from tasks.deployment.sizing import Plan, gigabytes
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


def write_serving(bundle: Path, settings: Settings, target: str, variant: str) -> None:
    """Write `bundle`/serve: settings, manifests and instructions for servers. The same bytes for the same inputs.

    TaskError if the model does not fit the described hardware (package.hardware). For the target onnx, and for files
    that vLLM does not load, only README.md with the reason.
    """
    folder = bundle / "serve"
    refusal = why_not_vllm(variant, settings.variant(variant)) if files_of(target) == "transformers" else ""
    if target == "onnx" or refusal:
        write_text(folder / "README.md", _render("README_without.md.j2", name=settings.package.name, refusal=refusal))
        return
    for name, contents in _Serving(bundle, settings, target).files():
        if isinstance(contents, str):
            write_text(folder / name, contents)
        elif name.endswith(".json"):
            write_json(folder / name, contents)
        else:
            write_text(folder / name, to_yaml(contents))


@dataclass(frozen=True)
class _Serving:
    """The files for one bundle."""

    bundle: Path
    settings: Settings
    target: str

    def files(self) -> Iterator[tuple[str, Any]]:
        """Names below serve/ and contents: text, or values for YAML or JSON."""
        name, hardware = self.settings.package.name, self.settings.package.hardware
        product = hardware.gpu if hardware else None
        shape = read_shape(self.bundle)
        plan, template = plan_of(shape, hardware), read_template(self.bundle)
        sampling = recommended_sampling(self.bundle)
        llama_cpp = self.target == "gguf"
        arguments = llama_cpp_command(name, plan, sampling, gpu=product is not None) if llama_cpp else None
        caddyfile = _render("Caddyfile.j2", port=PROXY_PORT, paths=PATHS, tls=True)

        if not plan.grouped:
            yield "compose.yaml", compose.compose(plan, product is not None, arguments)
            if template.chat:
                yield "compose.webui.yaml", compose.compose_webui(template, llama_cpp)
                yield "webui.caddy", _render("webui.caddy.j2", port=compose.WEBUI_PORT)
        yield "Caddyfile", caddyfile
        if not llama_cpp:
            yield "vllm.yaml", vllm_settings(name, plan, template, product is not None)
            yield "Dockerfile", _render("Dockerfile.j2", **self._image())
            yield "kubernetes/common.yaml", kubernetes.common(name, caddyfile, plan)
            if not plan.grouped:
                inside = _render("Caddyfile.j2", port=kubernetes.KSERVE_PORT, paths=PATHS, tls=False)
                yield "kubernetes/deployment.yaml", [kubernetes.deployment(name, plan, product)]
                yield "kubernetes/kserve.yaml", kubernetes.inference_service(name, plan, product, inside)
            if plan.machines > 1:
                yield "kubernetes/leaderworkerset.yaml", [kubernetes.leader_worker_set(name, plan, product)]
            yield "kubernetes/autoscaling.yaml", [kubernetes.autoscaling(name, plan)]
            yield "kubernetes/monitoring.yaml", kubernetes.monitoring(name)
            yield "monitoring/alerts.yaml", alert_rules(name)
            yield "monitoring/dashboard.json", dashboard(name)
        yield (
            "README.md",
            _render(
                "README.md.j2",
                name=name,
                hardware=hardware,
                shape=shape,
                plan=plan,
                chat_template=template,
                sampling=sampling,
                llama_cpp=llama_cpp,
                paths=PATHS,
                ports={"api": PROXY_PORT, "webui": compose.WEBUI_PORT},
                user=USER,
                commands=_commands(plan),
                ray=_on_ray(plan),
                gigabytes=gigabytes,
            ),
        )

    def _image(self) -> dict[str, Any]:
        return {
            "name": self.settings.package.name,
            "model": MODEL,
            "environment": ENVIRONMENT,
            "user": USER,
            "port": PORT,
            "command": vllm_command(),
        }


def _commands(plan: Plan) -> list[str]:
    """The command of each machine, if there are several."""

    def arguments(rank: int) -> list[str]:
        if plan.grouped:
            return group_arguments(str(rank), "$LEADER", follower=rank > 0)
        return copies_arguments(plan, str(rank * plan.copies), "$LEADER", follower=rank > 0)

    machines = plan.pipeline if plan.grouped else plan.machines
    return [" ".join(vllm_command(*arguments(rank))) for rank in range(machines)] if machines > 1 else []


def _on_ray(plan: Plan) -> str:
    """The command on a Ray cluster, which starts the processes of all machines."""
    if plan.grouped:
        return " ".join(vllm_command("--nnodes=1", "--distributed-executor-backend=ray"))
    copies = ("--data-parallel-backend=ray", f"--data-parallel-size={plan.copies * plan.machines}")
    return " ".join(vllm_command(*copies, f"--data-parallel-size-local={plan.copies}"))


def _render(template: str, **values: Any) -> str:
    return render(template, escape=False, folder=TEMPLATES, **values)
