"""Stages on a real Dask cluster of two worker processes: distributed, retried after a loss, ended with their run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from flows.processes.forked import SHARED
from tests.functional.toy import STAGES, Toy, cli_env
from tests.waiting import soon

pytest.importorskip("prefect_dask")
pytestmark = pytest.mark.slow

MADE = ("models", "metrics", "report")  # outputs of the toy's stages


def outputs(toy: Toy) -> dict[str, bytes]:
    """The bytes of all outputs, and DVC's records of them."""
    files = [path for folder in MADE for path in (toy.root / folder).rglob("*") if path.is_file()]
    return {path.relative_to(toy.root).as_posix(): path.read_bytes() for path in [*files, toy.root / "dvc.lock"]}


def stage_process(toy: Toy, stage: str, other_than: int = 0) -> int:
    """The pid of the sleeping or waiting stage, other than the pid `other_than`."""
    mark = toy.root / f"pid-{stage}"

    def there() -> bool:
        return mark.exists() and mark.read_text() not in ("", str(other_than))

    assert soon(there, 90), f"{stage} did not start"
    return int(mark.read_text())


def worker_of(pid: int) -> int:
    """The worker process that started the stage `pid`, itself or through its fork server."""
    above = psutil.Process(pid).parents()
    guard = next(place for place, process in enumerate(above) if "guard.py" in " ".join(process.cmdline()))
    owner = above[guard + 1]
    return int(owner.ppid() if owner.cmdline()[0].startswith("fork_server.py") else owner.pid)


class Run:
    """`modelpress run` on a cluster, in its own process."""

    def __init__(self, toy: Toy, *options: str, **env: str) -> None:
        # each worker starts a fork server, as for a user, and does not share that of the tests
        self.process = toy.start_cli("run", "--runner", "dask", *options, **{SHARED: "", **env})

    def end(self) -> str:
        """Wait for the end of the run and return its output."""
        output, _ = self.process.communicate(timeout=180)
        return output


@pytest.fixture
def start(prefect_server: str) -> Iterator[Callable[..., Run]]:
    """Start runs on a cluster; all are ended afterwards."""
    runs: list[Run] = []

    def begin(toy: Toy, *options: str, **env: str) -> Run:
        runs.append(Run(toy, *options, PREFECT_API_URL=prefect_server, **env))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.communicate()


def test_variants_spread_over_workers_and_a_killed_workers_stage_is_done_again(
    toy: Toy, tmp_path: Path, start: Callable[..., Run], prefect_server: str
) -> None:
    toy.set(variants__int8__smoothing=0.45, model__source="path:elsewhere")
    alike = toy.copy(tmp_path / "alike")
    before = len(toy.executed())
    for name in ("int8", "base"):
        toy.wish(f"quantize@{name}", "wait")
    run = start(toy)
    stages = {name: stage_process(toy, f"quantize@{name}") for name in ("int8", "base")}
    workers = {name: worker_of(pid) for name, pid in stages.items()}
    assert len(set(workers.values())) == 2
    assert run.process.pid not in workers.values()

    os.kill(workers["int8"], signal.SIGKILL)
    again = stage_process(toy, "quantize@int8", other_than=stages["int8"])
    # the two attempts never overlap
    assert not psutil.pid_exists(stages["int8"])
    assert worker_of(again) != workers["int8"]
    for name in ("int8", "base"):
        toy.write(f"go-quantize@{name}", "")
    output = run.end()
    assert run.process.returncode == 0, output
    assert "8 executed" in output
    executed = toy.executed()[before:]
    assert sorted(executed) == sorted([*STAGES, "quantize@int8"])

    alike.run()
    assert outputs(toy) == outputs(alike)
    assert "Running stage" not in toy.dvc("repro")
    _check_records(prefect_server, toy)


def _check_records(server: str, toy: Toy) -> None:
    """Check that Prefect has every stage as completed, with its log lines from a worker."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.objects import TaskRunResult

    run_id = toy.mlflow_runs()[-1].data.tags["prefect.flow_run_id"]
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])), limit=200)
    names = {run.id: run.name for run in runs}
    (load,) = (run for run in runs if run.name == "load@int8")
    needs = [names[up.id] for up in load.task_inputs["wait_for"] if isinstance(up, TaskRunResult)]
    assert needs == ["quantize@int8"]
    assert {run.name: run.state_name for run in runs} == dict.fromkeys(STAGES, "Completed")
    lines = [log.message for log in logs]
    # pending logs of the killed worker are lost: the first stage may have been its own
    assert {f"working on {stage}" for stage in STAGES if stage != "download"} <= set(lines)
    assert len({line for line in lines if ", worker process " in line}) >= 2


HELPER = """
import os, sys, time
from pathlib import Path

name, until = sys.argv[1:]
Path(f"helper-{name}").write_text(str(os.getpid()))
while Path(until).exists() and not Path(f"go-quantize@{name}").exists():
    time.sleep(0.1)
print("helped")
"""


def test_an_idle_worker_helps_a_stage_that_shares_its_work(
    toy: Toy, tmp_path: Path, start: Callable[..., Run], prefect_server: str
) -> None:
    toy.set(variants__int8__smoothing=0.45)
    toy.write("tasks/quantizers/__init__.py", "")
    toy.write("tasks/quantizers/assist.py", HELPER)
    alike = toy.copy(tmp_path / "alike")
    toy.wish("quantize@int8", "wait")
    run = start(toy, MODELPRESS_ASSIST_AFTER="0")
    stage = stage_process(toy, "quantize@int8")
    assert soon((toy.root / "helper-int8").exists, 60)
    helper = int((toy.root / "helper-int8").read_text())
    assert worker_of(helper) != worker_of(stage)
    toy.write("go-quantize@int8", "")
    output = run.end()
    assert run.process.returncode == 0, output
    assert soon(lambda: not psutil.pid_exists(helper), 20)
    assert not list((toy.root / ".modelpress/assist").iterdir())
    alike.run()
    assert outputs(toy) == outputs(alike)


def test_a_helper_that_fails_or_hangs_does_not_matter(toy: Toy, start: Callable[..., Run]) -> None:
    toy.set(variants__int8__smoothing=0.45)
    toy.write("tasks/quantizers/__init__.py", "")
    toy.write("tasks/quantizers/assist.py", HELPER + "\nsys.exit('error: found 3, expected 4')")
    toy.wish("quantize@int8", "sleep 6")
    run = start(toy, MODELPRESS_ASSIST_AFTER="0")
    assert soon((toy.root / "helper-int8").exists, 90)
    toy.write("go-quantize@int8", "")
    output = run.end()
    assert run.process.returncode == 0, output
    assert "quantize@int8 did without help: found 3, expected 4" in output

    (toy.root / "go-quantize@int8").unlink()
    (toy.root / "helper-int8").unlink()
    toy.set(variants__int8__smoothing=0.55)
    run = start(toy, MODELPRESS_ASSIST_AFTER="0")
    assert soon((toy.root / "helper-int8").exists, 90)
    output = run.end()
    assert run.process.returncode == 0, output
    assert soon(lambda: not psutil.pid_exists(int((toy.root / "helper-int8").read_text())), 20)


def test_nothing_to_do_starts_no_cluster(toy: Toy, start: Callable[..., Run]) -> None:
    run = start(toy)
    assert "8 unchanged" in run.end()
    assert not list((toy.root / ".modelpress/dask").iterdir())


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_ends_takes_its_stages_and_workers_along(toy: Toy, start: Callable[..., Run], sign: int) -> None:
    old = toy.read("models/int8/content.json")
    toy.set(variants__int8__smoothing=0.45)
    toy.wish("quantize@int8", "sleep 600")
    run = start(toy)
    stage_process(toy, "quantize@int8")
    family = psutil.Process(run.process.pid).children(recursive=True)
    assert not (toy.root / "models/int8").exists()
    if sign == signal.SIGINT:
        os.killpg(run.process.pid, sign)  # like a terminal: also to the workers
    else:
        os.kill(run.process.pid, sign)
    output = run.end()
    assert soon(lambda: not any(child.is_running() for child in family), 20)
    if sign == signal.SIGINT:
        assert run.process.returncode == 130
        assert output.splitlines()[-1].startswith("interrupted; ")
        assert "Traceback" not in output
        assert toy.mlflow_runs()[-1].info.status == "KILLED"
        assert toy.read("models/int8/content.json") == old
    toy.wish("quantize@int8", "fail")
    with pytest.raises(Exception, match="found 3, expected 4"):
        toy.run()
    assert toy.read("models/int8/content.json") == old


def test_a_deployed_run_on_a_cluster_leaves_the_same_as_one_in_threads(
    toy: Toy, tmp_path: Path, prefect_server: str
) -> None:
    toy.set(variants__int8__smoothing=0.45, model__source="path:elsewhere", model__sha256=None)
    toy.command("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--all", "--message", "new")
    alike = toy.copy(tmp_path / "alike")
    on_workers = press(toy, "otter", PREFECT_API_URL=prefect_server, MODELPRESS_RUNNER="dask")
    assert ", worker process " in on_workers
    in_threads = press(alike, "otter", PREFECT_API_URL=prefect_server)
    assert ", worker process " not in in_threads
    for output in (on_workers, in_threads):
        assert output.splitlines()[-1] == str(dict.fromkeys(STAGES, "executed"))
    kept, same = (checked_out(run, "run/otter", tmp_path / f"{run.root.name}-kept") for run in (toy, alike))
    files, others = outputs(kept), outputs(same)
    # the order in dvc.lock depends on which of two stages ends first
    assert yaml.safe_load(files.pop("dvc.lock")) == yaml.safe_load(others.pop("dvc.lock"))
    assert files == others
    assert "report/transformers/summary.json" in files


def press(toy: Toy, name: str, **env: str) -> str:
    """Output and result of the deployed flow, in its own process like a worker's."""
    code = (
        "from flows.press import press;"
        f"results = press.with_options(flow_run_name={name!r})();"
        f"print({{stage: results[stage] for stage in {STAGES}}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=toy.root, env=cli_env(**env), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr + done.stdout


def checked_out(toy: Toy, tag: str, place: Path) -> Toy:
    """A clone at the tag with all outputs from the cache only."""
    clone = Toy(place)
    toy.command("git", "clone", "--quiet", "--branch", tag, str(toy.root), str(place))
    clone.write(".dvc/config.local", f"[cache]\n    dir = {toy.root}/.dvc/cache\n")
    clone.dvc("checkout")
    return clone


@pytest.fixture
def cluster(tmp_path: Path, prefect_server: str) -> Iterator[str]:
    """The address of an existing Dask cluster with one worker, started by Dask's commands."""
    file = tmp_path / "scheduler.json"
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    words = [
        ["scheduler", "--host", "127.0.0.1", "--port", "0", *common],
        [
            "worker",
            "--nthreads",
            "1",
            "--preload",
            "flows.execution.dask_worker",
            "--local-directory",
            str(tmp_path),
            *common,
        ],
    ]
    processes = [
        subprocess.Popen([sys.executable, "-m", "dask", *line], cwd=tmp_path, env=cli_env(), start_new_session=True)
        for line in words
    ]
    try:
        assert soon(file.exists, 60)
        from distributed import Client

        with Client(scheduler_file=str(file)) as client:
            client.wait_for_workers(1, timeout=60)
            yield str(client.scheduler.address)
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            process.wait(30)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_stages_on_a_cluster_that_stays_end_with_their_run(
    toy: Toy, cluster: str, start: Callable[..., Run], sign: int
) -> None:
    old = toy.read("models/int8/content.json")
    toy.set(variants__int8__smoothing=0.45)
    toy.wish("quantize@int8", "sleep 600")
    run = start(toy, MODELPRESS_CLUSTER=cluster)
    stage = psutil.Process(stage_process(toy, "quantize@int8"))
    worker = worker_of(stage.pid)
    os.kill(run.process.pid, sign)
    run.end()
    if sign == signal.SIGKILL:  # it could not stop them: the next run in this checkout does
        toy.wish("quantize@int8", "fail")
        with pytest.raises(Exception, match="found 3, expected 4"):
            toy.run(runner="dask", cluster=cluster)
    assert soon(lambda: not stage.is_running(), 20)
    assert psutil.pid_exists(worker)
    assert toy.read("models/int8/content.json") == old
