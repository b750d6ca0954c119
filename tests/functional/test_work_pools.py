"""Prefect's commands on a real server: the work pools of deploy/, and the manual steps in prefect.yaml."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.functional.toy import PROJECT, Toy


def create(name: str, kind: str, template: Path, server: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "work-pool", "create", name, "--type", kind]
    return subprocess.run(
        [*command, "--base-job-template", str(template)],
        env={**os.environ, "PREFECT_API_URL": server},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_server_accepts_the_pool(kind: str, prefect_server: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import PrefectHTTPStatusError

    file = PROJECT / f"deploy/{kind}.json"
    done = create(f"test-{kind}", kind, file, prefect_server)
    assert done.returncode == 0, done.stdout + done.stderr
    with get_client(sync_client=True) as client:
        pool = client.read_work_pool(f"test-{kind}")
        assert pool.type == kind
        assert pool.base_job_template == json.loads(file.read_text(encoding="utf-8"))
        broken = json.loads(file.read_text(encoding="utf-8"))
        del broken["variables"]["properties"]["image"]
        with pytest.raises(PrefectHTTPStatusError, match="422"):
            client.create_work_pool(WorkPoolCreate(name=f"broken-{kind}", type=kind, base_job_template=broken))


@pytest.mark.slow
def test_a_run_by_hand_as_prefect_yaml_says(toy: Toy, prefect_server: str) -> None:
    shutil.copy(PROJECT / "prefect.yaml", toy.root)
    (toy.root / "flows").symlink_to(PROJECT / "flows")  # the flow's location in prefect.yaml
    create_pool, deploy, start_worker = re.findall(r"^# +(prefect .+)$", toy.read("prefect.yaml"), re.MULTILINE)
    page = (PROJECT / "docs/operating.md").read_text(encoding="utf-8").splitlines()
    assert {create_pool, deploy, start_worker} <= set(page)

    by_hand(toy, create_pool, prefect_server)
    assert {"press/nightly", "press/on-demand"} <= set(by_hand(toy, deploy, prefect_server).replace("'", " ").split())
    with at_work(toy, start_worker, prefect_server):
        by_hand(toy, "prefect deployment run press/on-demand -p gate_four_bit=0.85 --watch", prefect_server)
    tag = toy.command("git", "tag", "--list", "run/*").strip()
    assert "four_bit: 0.85\n" in toy.command("git", "show", f"{tag}:params.yaml")
    assert state_of(tag) == "Completed"


def by_hand(toy: Toy, command: str, server: str) -> str:
    """Return the output of a command in an activated environment; it must succeed."""
    done = subprocess.run(
        command.split(),
        cwd=toy.root,
        env=activated(server),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def at_work(toy: Toy, command: str, server: str) -> Iterator[None]:
    """Run the command during the body; end it by Ctrl-C."""
    with (toy.root / "worker.log").open("w") as log:
        process = subprocess.Popen(
            command.split(), cwd=toy.root, env=activated(server), stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)


def activated(server: str) -> dict[str, str]:
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PREFECT_API_URL": server}


def state_of(tag: str) -> str | None:
    """The server's state of the run that ended as `tag`."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    name = FlowRunFilter(name=FlowRunFilterName(any_=[tag.removeprefix("run/")]))
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(flow_run_filter=name)
    return run.state_name
