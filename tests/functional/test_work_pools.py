"""A real Prefect server takes the work pools of deploy/, by its own command, and refuses a broken template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


def create(name: str, kind: str, template: Path, server: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "work-pool", "create", name, "--type", kind]
    return subprocess.run(
        [*command, "--base-job-template", str(template)],
        env={**os.environ, "PREFECT_API_URL": server},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_server_takes_the_pool_as_it_is(kind: str, prefect_server: str, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    file = PROJECT / f"deploy/{kind}.json"
    done = create(f"test-{kind}", kind, file, prefect_server)
    assert done.returncode == 0, done.stdout + done.stderr
    with get_client(sync_client=True) as client:
        pool = client.read_work_pool(f"test-{kind}")
    assert pool.type == kind
    assert pool.base_job_template == json.loads(file.read_text(encoding="utf-8"))

    broken = json.loads(file.read_text(encoding="utf-8"))
    del broken["variables"]["properties"]["image"]
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    assert create(f"broken-{kind}", kind, tmp_path / "broken.json", prefect_server).returncode != 0
