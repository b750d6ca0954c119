"""llama.cpp's server: its command line, its build, and what goes wrong before and during the build."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.environments import locked
from tasks.errors import TaskError, TransientError
from tasks.serving import llama_server
from tasks.serving.llama_server import LOCK, OPTIONS, Serving, server_command

PROGRAM = Path("/programs/llama-server")


class TestCommand:
    def test_each_slot_has_the_full_context(self) -> None:
        serving = Serving(port=8080, name="tiny", context=1024, slots=3, threads=2, key_file=Path("keys"))
        command = server_command(PROGRAM, Path("model.gguf"), serving)
        assert command[0] == str(PROGRAM)
        pairs = dict(itertools.pairwise(command))
        wanted = {
            "--model": "model.gguf", "--alias": "tiny", "--host": "127.0.0.1", "--port": "8080",
            "--ctx-size": "3072", "--parallel": "3", "--threads": "2", "--api-key-file": "keys",
        }  # fmt: skip
        assert wanted.items() <= pairs.items()
        assert {"--jinja", "--metrics", "--no-webui", "--offline", "--no-kv-unified"} <= set(command)

    def test_without_a_context_the_models_own_is_used_and_no_key_is_asked_for(self) -> None:
        command = server_command(PROGRAM, Path("model.gguf"), Serving(port=1, name="tiny"))
        assert command[command.index("--ctx-size") + 1] == "0"
        assert "--kv-unified" in command
        assert "--api-key-file" not in command


class TestBuild:
    def test_the_source_is_the_version_that_evaluates_with_a_checksum(self) -> None:
        (line,) = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
        requirement, _, checksum = line.partition(" --hash=sha256:")
        assert requirement == f"llama-cpp-python=={locked('llama-cpp')['llama-cpp-python']}"
        assert len(checksum) == 64

    def test_nothing_else_is_downloaded(self) -> None:
        assert OPTIONS["LLAMA_USE_PREBUILT_UI"] == OPTIONS["LLAMA_BUILD_UI"] == "OFF"

    @pytest.mark.parametrize("lacking", ["cmake", "make"])
    def test_a_missing_tool_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
        for name in {"cmake", "c++", "make"} - {lacking}:
            (tmp_path / name).symlink_to("/bin/true")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        with pytest.raises(TaskError, match=rf"no {lacking} on PATH.*apt install {lacking}"):
            llama_server.llama_server(tmp_path / "cache")
        monkeypatch.setenv("CXX", "no-compiler")
        (tmp_path / lacking).symlink_to("/bin/true")
        with pytest.raises(TaskError, match=r"no no-compiler on PATH.*apt install g\+\+"):
            llama_server.llama_server(tmp_path / "cache")

    def test_a_build_that_fails_keeps_its_log_and_no_program(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _program(tmp_path / "cmake", "echo no such generator; exit 3")
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(llama_server, "_fetch", lambda folder, log: folder.mkdir())
        monkeypatch.setattr(llama_server, "_unpack", lambda folder, destination: destination)
        with pytest.raises(TaskError, match=r"cmake ended with status 3: no such generator") as error:
            llama_server.llama_server(tmp_path / "cache", progress="")
        (log,) = tmp_path.glob("cache/*/build.log")
        assert str(log) in str(error.value)
        assert [path.name for path in log.parent.iterdir()] == ["build.log"]

    @pytest.mark.parametrize(
        ("says", "kind", "match"),
        [
            ("THESE PACKAGES DO NOT MATCH THE HASHES", TaskError, "another checksum than llama-server.lock expects"),
            ("Network is unreachable", TransientError, "could not be fetched"),
        ],
    )
    def test_a_source_that_does_not_arrive(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, kind: type[TaskError], match: str
    ) -> None:
        _program(tmp_path / "python", f"echo {says}; exit 1")
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        with pytest.raises(TaskError, match=match) as error:
            llama_server.llama_server(tmp_path / "cache", progress="")
        assert type(error.value) is kind

    def test_the_program_is_built_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a cmake that writes a program, as the real one does at the end."""
        _program(
            tmp_path / "cmake",
            f'if [ "$1" = --build ]; then echo "[ 50%] Building"; mkdir -p "$2/bin"; '
            f'cp {tmp_path}/made "$2/bin/llama-server"; echo x >> {tmp_path}/count; fi',
        )
        _program(tmp_path / "made", "echo version")
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(llama_server, "_fetch", lambda folder, log: folder.mkdir())
        monkeypatch.setattr(llama_server, "_unpack", lambda folder, destination: destination)
        first = llama_server.llama_server(tmp_path / "cache", progress="")
        assert llama_server.llama_server(tmp_path / "cache", progress="") == first
        assert (tmp_path / "count").read_text() == "x\n"
        assert sorted(path.name for path in first.parent.iterdir()) == ["build.log", "llama-server"]


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a compiler")
def test_the_real_server_is_built_and_starts() -> None:
    """In the user's cache, so that the build is not repeated: it takes 10 to 30 minutes of processor time."""
    program = llama_server.llama_server()
    done = subprocess.run([str(program), "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    command = server_command(program, Path("missing.gguf"), Serving(port=1, name="tiny", context=64))
    failed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert failed.returncode
    # the file is what is missing: the options are known
    assert "missing.gguf" in failed.stdout + failed.stderr
    assert "invalid argument" not in failed.stdout + failed.stderr
