"""Stages forked from a process with imported libraries behave like `python -m`."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows.processes import forked
from flows.processes.forked import SHARED, fork_server
from flows.processes.process import Process
from flows.processes.run_module import stage_environment

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="stages are forked only on Linux")

PROGRAM = """
import os, sys, time
WISHES = {
    "say": lambda: print(*sys.argv[1:], __name__, __spec__.name, "lm_eval" in sys.modules, os.getcwd()),
    "where": lambda: print(sys.argv[0], sys.path[0], *(name for name in sys.modules if name.startswith("flows"))),
    "threads": lambda: print(__import__("torch").get_num_threads()),
    "python": lambda: os.system("python -c 'import sys; print(sys.executable)'"),
    "group": lambda: print(os.getpgid(0), os.getppid()),
    "open": lambda: print(sorted(os.listdir("/proc/self/fd"))),
    "raise": lambda: 1 / 0,
    "refuse": lambda: sys.exit("error: no"),
    "three": lambda: sys.exit(3),
    "killed": lambda: os.kill(os.getpid(), 9),
    "terminated": lambda: os.kill(os.getpid(), 15),
    "sleep": lambda: (print(os.getpid(), flush=True), time.sleep(600)),
}
WISHES[sys.argv[1]]()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with one stage program."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "tasks").mkdir()
    (root / "tasks/__init__.py").touch()
    (root / "tasks/stage.py").write_text(PROGRAM)
    return root


@pytest.fixture(scope="module", autouse=True)
def one_server() -> None:
    assert fork_server() is not None, "tests/conftest.py starts one for all tests"


def stage(folder: Path, *arguments: str, threads: int = 1, keep: tuple[int, ...] = ()) -> Process:
    """Run `python -m tasks.stage ARGUMENTS` in a shell, like DVC."""
    command = ["sh", "-c", f"python -m tasks.stage {' '.join(arguments)}"]
    process = Process(command, folder, stage_environment(os.environ, threads), forked=True, keep=keep)
    assert isinstance(process._popen, forked.Forked)
    return process


def ran(folder: Path, *arguments: str, threads: int = 1) -> tuple[int, str]:
    """Run the stage; return its exit status and output."""
    with stage(folder, *arguments, threads=threads) as process:
        output = b"".join(process.chunks()).decode()
        return process.wait(), output


def test_a_module_is_run_in_its_folder_with_its_arguments(folder: Path) -> None:
    assert ran(folder, "say", "b") == (0, f"say b __main__ tasks.stage True {folder}\n")
    assert ran(folder, "where") == (0, f"{folder}/tasks/stage.py {folder}\n")  # and no module of flows/ is loaded


def test_the_environment_decides_the_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert ran(folder, "threads", threads=1) == (0, "1\n")
    assert ran(folder, "threads", threads=2) == (0, "2\n")


def test_variables_read_at_import_cause_a_new_interpreter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(folder))
    assert ran(folder, "say") == (0, f"say __main__ tasks.stage False {folder}\n")


def test_a_stage_finds_the_real_python(folder: Path) -> None:
    # the executable of this process may have another name, such as python3
    assert ran(folder, "python") == (0, f"{Path(sys.executable).with_name('python')}\n")


@pytest.mark.parametrize(
    ("wish", "status", "last"),
    [
        ("raise", 1, "ZeroDivisionError: division by zero"),
        ("refuse", 1, "error: no"),
        ("three", 3, ""),
        ("killed", 137, "Killed"),
        ("terminated", 143, "Terminated"),
    ],
)
def test_the_exit_status_is_that_of_a_separate_process(folder: Path, wish: str, status: int, last: str) -> None:
    found, output = ran(folder, wish)
    alone = subprocess.run(
        ["sh", "-c", f"python -m tasks.stage {wish}"], cwd=folder, env=stage_environment(os.environ, 1), check=False
    )
    assert found == status
    assert alone.returncode in (status, 128 - status)
    assert output.rstrip().endswith(last)


def test_all_processes_of_a_stage_are_in_one_group(folder: Path) -> None:
    with stage(folder, "group") as process:
        group, parent = b"".join(process.chunks()).split()
        assert int(group) == int(parent) == process._popen.pid


def test_a_stage_inherits_no_extra_open_files(folder: Path, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock, stage(folder, "open", keep=(lock.fileno(),)) as process:
        assert b"".join(process.chunks()) == b"['0', '1', '2', '3']\n"  # the last one belongs to listdir


@pytest.mark.parametrize("victim", ["stage", "client", "guard", "owner's end"])
def test_killing_one_process_ends_all(folder: Path, victim: str) -> None:
    process = stage(folder, "sleep")
    with process:
        pid = next(int(chunk) for chunk in process.chunks() if chunk.strip())
        family = {*process.descendants(), psutil.Process(process._popen.pid)}
        assert psutil.Process(pid) in family
        assert psutil.Process(pid).cmdline()[0] == f"{sys.executable} -m tasks.stage sleep"
        if victim == "stage":
            os.kill(pid, signal.SIGKILL)
        elif victim == "client":
            (client,) = (one for one in family if any(word.endswith("fork_client.py") for word in one.cmdline()))
            client.kill()
        elif victim == "guard":
            os.kill(process._popen.pid, signal.SIGKILL)
        if victim != "owner's end":
            assert soon(lambda: not process.alive)
            assert process.wait() == 137
    assert soon(lambda: not any(map(_runs, family)))


def test_a_lock_is_held_until_all_processes_have_ended(folder: Path, tmp_path: Path) -> None:
    """Even if the flow is killed, because its guard holds the lock."""
    code = f"""
import fcntl, os
from pathlib import Path
from tests.unit.test_flows_fork import stage
lock = open("lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
with stage(Path({str(folder)!r}), "sleep", keep=(lock.fileno(),)) as process:
    for chunk in process.chunks():
        print(chunk.decode(), flush=True)
"""
    project = str(Path(__file__).resolve().parents[2])
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": project},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    pid = int(next(line for line in owner.stdout if line.strip()))
    with (tmp_path / "lock").open() as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner.kill()
        owner.wait()
        owner.stdout.close()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not psutil.pid_exists(pid) or not _runs(psutil.Process(pid))


def test_a_command_runs_without_a_server_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, env = ["sh", "-c", "echo here"], dict(os.environ)
    for address in ("0", str(folder / "nobody")):
        monkeypatch.setenv(SHARED, address)
        with Process(command, folder, env, forked=True) as process:
            assert isinstance(process._popen, subprocess.Popen)
            assert b"".join(process.chunks()) == b"here\n"


def test_a_server_ends_with_its_owner_and_removes_its_folder() -> None:
    code = "from flows.processes.forked import ForkServer; print(ForkServer().folder, flush=True); input()"
    for end in (subprocess.Popen.kill, lambda owner: owner.communicate("\n")):
        owner = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert owner.stdout is not None
        place = Path(owner.stdout.readline().strip())
        assert place.stat().st_mode & 0o077 == 0, "other users must not be able to connect"
        end(owner)
        owner.wait()
        owner.stdout.close()
        deadline = time.monotonic() + 60
        while place.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def soon(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether the condition becomes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
