"""Servers as processes: started, watched, stopped, and what is said of those that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from tasks.deployment.tool_calling import Template
from tasks.errors import TaskError
from tasks.serving import engines
from tasks.serving.engines import FEATURES, Vllm, engine_of, served
from tasks.serving.process import NotServableHere, NotServed, last_words
from tests.waiting import soon

ROOT = Path(__file__).resolve().parents[2]


class Fake:
    """The engine of tests: tests/openai_fake.py."""

    name = "fake"
    health = "/health"
    running: str | None = "fake:running"
    offers = FEATURES
    faults: Sequence[str] = ()

    def version(self) -> str:
        return "1.0"

    def program(self) -> list[str]:
        return [sys.executable, "-m", "tests.openai_fake"]

    def arguments(self, folder: Path, name: str, dtype: str, context: int | None) -> list[str]:
        faults = [part for fault in self.faults for part in ("--fault", fault)]
        return ["--name", name, "--context", str(context or 256), *faults]

    def environment(self, folder: Path, context: int | None) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT)}

    def computes_in(self, folder: Path, dtype: str) -> str:
        return "float32"

    def not_here(self, folder: Path, words: str) -> str | None:
        return "needs more" if "no kernel for" in words and (folder / "rare").exists() else None


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The engine of the target `fake`."""
    found = Fake()
    monkeypatch.setitem(engines.ENGINES, "fake", lambda: found)
    return found


def test_a_server_answers_inside_and_is_gone_outside(engine: Fake, tmp_path: Path) -> None:
    with served("fake", tmp_path, "m", "auto", tmp_path / "logs" / "log", context=128) as server:
        found = httpx.get(f"{server.url}/v1/models", trust_env=False).json()
        assert found["data"][0]["id"] == server.name == "m"
        assert server.command == [
            Path(sys.executable).name,
            "-m",
            "tests.openai_fake",
            "--name",
            "m",
            "--context",
            "128",
        ]
        assert (server.engine, server.version) == ("fake", "1.0")
        assert os.getpgid(server.pid) == server.pid != os.getpgid(0)
        assert server.cpu_seconds() > 0
        assert server.peak_memory_bytes() > 10_000_000
        assert 0 < server.start_seconds < 120
        guards = [p for p in psutil.Process().children() if str(server.pid) in p.cmdline()]
        assert len(guards) == 1
    assert not psutil.pid_exists(server.pid)
    assert not guards[0].is_running()
    assert server.cpu_seconds() == 0


def test_a_server_that_does_not_start_leaves_its_last_words(engine: Fake, tmp_path: Path) -> None:
    engine.faults = ["does not start"]
    with pytest.raises(NotServed) as caught, served("fake", tmp_path, "m", "auto", tmp_path / "log"):
        pass
    # the cause, without the logger's prefix, the folder, and the line that points to the cause
    assert caught.value.last_words == "ValueError: no kernel for model"
    assert "status 1" in caught.value.reason
    (tmp_path / "rare").touch()
    with pytest.raises(NotServableHere, match="needs more"), served("fake", tmp_path, "m", "auto", tmp_path / "log"):
        pass


def test_a_server_that_refuses_its_first_request_is_not_served(
    engine: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "ENDING", 0.1)  # this one goes on
    engine.faults = ["breaks on length"]
    with (
        pytest.raises(NotServed, match="first answer was 500"),
        served("fake", tmp_path, "m", "auto", tmp_path / "log", context=1),
    ):
        pass


def test_a_killed_stage_leaves_no_server(tmp_path: Path) -> None:
    code = f"""
        import time
        from pathlib import Path
        from tasks.serving import engines
        from tests.unit.test_serving_process import Fake
        engines.ENGINES["fake"] = Fake
        folder = Path({str(tmp_path)!r})
        with engines.served("fake", folder, "m", "auto", folder / "log") as server:
            print(server.pid, flush=True)
            time.sleep(600)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    stage = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    assert stage.stdout
    # after the lines of progress
    server = psutil.Process(next(int(line) for line in stage.stdout if line.strip().isdigit()))
    stage.send_signal(signal.SIGKILL)
    stage.communicate()
    assert soon(lambda: ended(server), 60)


def ended(process: psutil.Process) -> bool:
    """Whether a process has ended; nothing may have waited for it yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_last_words_are_errors_or_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log) == ""
    log.write_text("one\n\x1b[31mtwo\x1b[0m\n\n")
    assert last_words(log) == "one | two"
    log.write_text("RuntimeError: Engine core initialization failed. See root cause above.\n")
    assert last_words(log).startswith("RuntimeError")
    log.write_text("OSError: /a/b/c.so and http://host/a/b\n" * 2)
    assert last_words(log) == "OSError: c.so and http://host/a/b"
    log.write_text("ValueError: no kernel. Reasons:\n A cannot: no AMX\n B cannot: size 4\nTraceback of something\n")
    assert last_words(log) == "ValueError: no kernel. Reasons: A cannot: no AMX; B cannot: size 4"


def test_a_target_without_a_server() -> None:
    with pytest.raises(TaskError, match=r"the target 'transformers' has no server; there are servers for: .*vllm"):
        engine_of("transformers")


@pytest.mark.parametrize(
    ("config", "words", "expected"),
    [
        ("{}", "AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'", "AVX-512"),
        ('{"quantization_config": {"quant_method": "fp8"}}', "NotImplementedError: x", "FP8"),
        ('{"quantization_config": {"config_groups": {"0": {"weights": {"type": "float"}}}}}', "ValueError: x", "FP8"),
        ('{"num_experts": 8}', "NotImplementedError: no MoE backend", "AMX"),
        ('{"num_experts": 8}', "ValueError: x", None),
        ("{}", "NotImplementedError: no MoE backend", None),
        ("{}", "ValueError: FP8", None),
    ],
)
def test_what_a_processor_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, words: str, expected: str | None
) -> None:
    (tmp_path / "config.json").write_text(config)
    monkeypatch.setattr(engines, "nvidia_gpu", lambda: False)
    found = Vllm().not_here(tmp_path, words)
    assert found is None if expected is None else expected in str(found)
    monkeypatch.setattr(engines, "nvidia_gpu", lambda: True)
    assert Vllm().not_here(tmp_path, words) is None


def test_what_vllm_is_started_with(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPRESS_VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setattr(engines, "nvidia_gpu", lambda: False)
    found = Vllm()
    assert found.program() == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    plain = found.arguments(llama, "m", "auto", 256)
    assert plain[:8] == ["--model", str(llama), "--served-model-name", "m", "--dtype", "auto", "--max-model-len", "256"]
    assert "--enforce-eager" in plain
    assert "--tool-call-parser" not in plain
    monkeypatch.setattr(engines, "read_template", lambda folder: Template(chat=True, tools=True, parser="hermes"))
    assert found.arguments(llama, "m", "auto", None)[-2:] == ["--tool-call-parser", "hermes"]
    environment = found.environment(llama, 256)
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not {"PYTHONPATH", "VLLM_API_KEY"} & set(environment)
    # four texts of 131,072 tokens, 2 layers of 2 key-value heads with 16 numbers, 2 bytes each, keys and values
    assert found.environment(llama, 131_072)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert found.environment(llama, 2_000_000)["VLLM_CPU_KVCACHE_SPACE"] == "2"
    monkeypatch.setattr(engines, "nvidia_gpu", lambda: True)
    assert "--enforce-eager" not in found.arguments(llama, "m", "auto", 256)
    assert "VLLM_CPU_KVCACHE_SPACE" not in found.environment(llama, 256)
