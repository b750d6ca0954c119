"""Deployed runs: each has a private workspace and ends as a commit with a tag; the user's checkout is unchanged."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.errors import FlowError
from flows.workspace.worktree import workspaces
from tests.functional.toy import STAGES, Toy, cli_env


@pytest.fixture
def here(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The user's checkout, in which a worker starts its runs."""
    monkeypatch.chdir(toy.root)
    return toy


def press(name: str, **choices: Any) -> dict[str, str]:
    """A deployed run with this name, in this process."""
    from flows.press import press as flow

    return dict(flow.with_options(flow_run_name=name)(**choices))


def snapshot(toy: Toy) -> dict[str, bytes]:
    """Every file of the user's checkout that git or DVC could have changed."""
    aside = (".git", ".modelpress", ".dvc/cache", ".dvc/tmp", "mlflow.db", "mlruns", ".prefect")
    files = (path for path in toy.root.rglob("*") if path.is_file())
    names = {path.relative_to(toy.root).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(aside)}


def test_a_run_is_kept_as_a_tag_that_reproduces_it(here: Toy, tmp_path: Path) -> None:
    before, head = snapshot(here), here.command("git", "rev-parse", "HEAD")
    results = press("Quiet Otter", gate_four_bit=0.85, variants=["int8"])
    assert results["quantize@int8"] == "restored"  # made by the first run, in the user's checkout
    assert "quantize@gptq-int4" not in results
    assert results["report"] == "executed"
    assert snapshot(here) == before
    assert here.command("git", "rev-parse", "HEAD") == head
    assert workspaces(here.root) == []
    assert here.command("git", "worktree", "list").count("\n") == 1

    clone = Toy(tmp_path / "clone")
    here.command("git", "clone", "--quiet", "--branch", "run/quiet-otter", str(here.root), str(clone.root))
    clone.write(".dvc/config.local", f"[cache]\n    dir = {here.root}/.dvc/cache\n")
    params = yaml.safe_load(clone.read("params.yaml"))
    assert (params["gate"]["four_bit"], list(params["variants"])) == (0.85, ["base", "int8"])
    assert clone.read("params.yaml").startswith("# a comment that must stay")
    assert set(yaml.safe_load(clone.read("dvc.lock"))["stages"]) == set(results)
    clone.dvc("repro")
    assert clone.executed() == []
    assert clone.command("git", "diff") == ""


def test_record_is_in_the_users_mlflow(here: Toy) -> None:
    press("otter", gate_four_bit=0.85)
    run = here.mlflow_runs()[-1]
    assert (run.info.run_name, run.info.status) == ("otter", "FINISHED")
    assert run.data.params["gate.four_bit"] == "0.85"


def test_failed_run_keeps_its_workspace_and_a_retry_resumes_there(here: Toy) -> None:
    here.wish("quantize@int8", "fail")
    here.command("git", "add", "wish")
    here.command("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "wish")
    with pytest.raises(FlowError, match="quantize@int8: quantize@int8 found 3, expected 4; fix it"):
        press("otter", changes_to_params=["variants.int8.smoothing=0.1"])
    (space,) = workspaces(here.root)
    assert (space.name, space.running, space.changes) == ("otter", False, ("variants.int8.smoothing=0.1",))
    assert "found 3, expected 4" in (space.error or "")
    assert here.command("git", "tag", "--list") == ""

    listed = here.call("runs").stdout
    assert "otter" in listed
    assert "failed" in listed
    assert "deleted" in here.call("runs", "--sweep").stdout
    assert workspaces(here.root) == []
    assert here.command("git", "worktree", "list").count("\n") == 1


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"changes_to_params": ["model.source=path:/etc"]}, "is outside the run's workspace"),
        ({"changes_to_params": ["variants.int8.smoothing=9"]}, "variants.int8.smoothing is 9"),
        ({"changes_to_params": ["package.name='../../x'"]}, "package.name is '../../x'"),
        ({"changes_to_params": ["model.licence=${oc.env:HOME}"]}, "is not supported"),
        ({"variants": []}, "variants: none selected"),
    ],
)
def test_invalid_choice_is_refused_by_name_at_once(here: Toy, choices: dict[str, Any], reason: str) -> None:
    with pytest.raises(FlowError) as caught:
        press("otter", **choices)
    assert reason in str(caught.value)
    assert workspaces(here.root) == []
    assert sorted(here.executed()) == sorted(STAGES)  # the first run's


def test_a_dry_run_does_nothing(here: Toy) -> None:
    states = press("otter", dry_run=True, changes_to_params=["variants.int8.smoothing=0.1"])
    assert states["quantize@int8"] == "changed"
    assert states["download"] == "cached"
    assert workspaces(here.root) == []
    assert here.command("git", "tag", "--list") == ""


@pytest.mark.slow
def test_duplicate_name_gets_part_of_the_runs_id(here: Toy) -> None:
    press("otter")
    press("otter")
    first, second = here.command("git", "tag", "--list", "run/*").split()
    assert first == "run/otter"
    assert second.startswith("run/otter-")


@pytest.mark.parametrize("runs", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_concurrent_runs_lose_nothing_and_share_stages(here: Toy, prefect_server: str, runs: int) -> None:
    """In separate processes, like a worker's: only one run computes a shared stage."""
    here.wish("quantize@int8", "sleep 2")
    here.set(variants__int8__smoothing=0.3)
    here.command("git", "add", "wish", "params.yaml")
    here.command("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "changed")

    def one(number: int) -> str:
        code = (
            "from flows.press import press;"
            f"print(press.with_options(flow_run_name='run-{number}')(gate_four_bit=0.8{number}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=here.root,
            env=cli_env(PREFECT_API_URL=prefect_server),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with ThreadPoolExecutor(runs) as pool:
        outputs = list(pool.map(one, range(runs)))
    assert sum("'quantize@int8': 'executed'" in output for output in outputs) == 1
    assert sum("'quantize@int8': 'restored'" in output for output in outputs) == runs - 1
    assert here.command("git", "tag", "--list", "run/*").split() == [f"run/run-{n}" for n in range(runs)]
    for number in range(runs):
        params = yaml.safe_load(here.command("git", "show", f"run/run-{number}:params.yaml"))
        assert params["gate"]["four_bit"] == float(f"0.8{number}")
    assert len(here.mlflow_runs()) == runs + 1
    assert workspaces(here.root) == []
