"""Models and data files from a fake model hub with the real one's HTTP API, and its failures."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tasks.download import download
from tasks.errors import TaskError, TransientError
from tasks.settings import ModelSettings
from tasks.sources import fetch_file
from tests.hub import FakeHub, Repository, running_hub
from tests.tiny import tiny_model
from tests.untrusted import untrusted_server

MODEL = "acme/tiny"
DATA = "datasets/acme/questions"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    # larger than the 10 MiB chunks in which the hub's library writes
    folder = tiny_model(tmp_path_factory.mktemp("llama"), hidden=320, layers=10)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def hub(llama_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with running_hub() as hub:
        hub.repositories[MODEL] = Repository(
            {**llama_files, "README.md": b"# tiny", "LICENSE": b"do as you like"}, licence="mit"
        )
        hub.repositories[DATA] = Repository({"data/test.jsonl": b'{"question": "why?"}\n'})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield hub


def settings(source: str = f"hf:{MODEL}@main", **more: str) -> ModelSettings:
    return ModelSettings.model_validate({"source": source, "dtype": "bfloat16", **more})


def refusal(source: str = f"hf:{MODEL}@main", *, transient: bool = False) -> str:
    """The error of the download; checks that no files are left."""
    with pytest.raises(TaskError) as caught:
        download(settings(source), Path("models/source"))
    # only transient errors are retried
    assert isinstance(caught.value, TransientError) == transient
    assert not Path("models/source").exists()
    assert [p.name for p in Path("models").iterdir()] == []
    return str(caught.value)


def test_a_branch_becomes_a_commit_and_every_file_arrives(hub: FakeHub, llama_files: dict[str, bytes]) -> None:
    report = download(settings(), Path("models/source"))

    commit = hub.repositories[MODEL].commit
    written = json.loads(Path("models/source/source.json").read_text())
    assert report.revision == written["revision"] == commit
    assert (written["kind"], written["licence"], written["dequantized_from"]) == ("hf", "mit", None)
    weights = Path("models/source/model.safetensors").read_bytes()
    assert weights == llama_files["model.safetensors"]
    assert written["files"]["model.safetensors"] == {
        "sha256": hashlib.sha256(weights).hexdigest(),
        "bytes": len(weights),
    }
    names = {p.name for p in Path("models/source").iterdir()}
    assert names >= {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    }
    assert "README.md" not in names
    assert {oct(p.stat().st_mode & 0o777) for p in Path("models/source").iterdir()} == {"0o644"}


def test_a_second_download_fetches_no_file_again(hub: FakeHub) -> None:
    download(settings(), Path("models/source"))
    hub.requests.clear()
    download(settings(), Path("models/source"))
    assert hub.asked("/resolve/") == hub.asked("/cdn/") == []


def test_broken_connection_is_resumed(hub: FakeHub, llama_files: dict[str, bytes]) -> None:
    hub.break_after = [11 << 20]
    download(settings(), Path("models/source"))
    assert hub.ranges() == [f"bytes={10 << 20}-"]
    assert Path("models/source/model.safetensors").read_bytes() == llama_files["model.safetensors"]


@pytest.mark.slow
def test_killed_download_is_resumed_by_the_next_run(hub: FakeHub, llama_files: dict[str, bytes]) -> None:
    hub.break_after, hub.hang = [11 << 20], True
    program = [
        sys.executable,
        "-c",
        f"""
from pathlib import Path
from tasks.download import download
from tasks.settings import ModelSettings
download(ModelSettings(source="hf:{MODEL}@main", dtype="bfloat16"), Path("models/source"))
""",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(program, env=environment, stderr=subprocess.DEVNULL)
    try:
        assert hub.hanging.wait(60)
        part = next(Path(".modelpress/downloads/hub").glob("*.part"))
        while part.stat().st_size < 10 << 20:
            assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not Path("models/source").exists()

    hub.hang = False
    subprocess.run(program, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert hub.ranges() == [f"bytes={10 << 20}-"]
    assert Path("models/source/model.safetensors").read_bytes() == llama_files["model.safetensors"]
    assert list(Path(".modelpress/downloads/hub").glob("*.part")) == []


def test_a_certificate_that_is_not_trusted_is_named_and_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.chdir(tmp_path)
    with untrusted_server(tmp_path) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        said = refusal()
    assert "127.0.0.1 shows a certificate that this machine does not trust" in said
    assert "SSL_CERT_FILE" in said


def test_bytes_with_a_wrong_checksum_are_deleted_and_refused(hub: FakeHub) -> None:
    repository = hub.repositories[MODEL]
    content = repository.files["model.safetensors"]
    repository.wrong["model.safetensors"] = content[:-1] + bytes([content[-1] ^ 1])
    said = refusal()
    assert "model.safetensors" in said
    assert hashlib.sha256(content).hexdigest() in said
    assert not [p for p in Path(".modelpress/downloads/hub").iterdir() if p.stat().st_size == len(content)]

    repository.wrong.clear()
    download(settings(), Path("models/source"))


def test_a_small_file_is_checked_too(hub: FakeHub) -> None:
    repository = hub.repositories[MODEL]
    repository.wrong["config.json"] = repository.files["config.json"].replace(b"320", b"321")
    assert "config.json" in refusal()


@pytest.mark.parametrize(("token", "what"), [(None, "HF_TOKEN is not set"), ("hf_other", "its token has no access")])
def test_gated_repository_names_the_remedy(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str | None, what: str
) -> None:
    hub.repositories[MODEL].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    said = refusal()
    assert "gated" in said
    assert what in said
    assert f"{hub.endpoint}/{MODEL}" in said
    assert token is None or token not in said


def test_the_token_comes_from_the_environment_and_goes_nowhere_else(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[MODEL].gated = True
    monkeypatch.setenv("HF_TOKEN", hub.token)
    download(settings(), Path("models/source"))

    sent = {r.host: r.headers.get("authorization") for r in hub.requests}
    assert sent.pop(hub.endpoint.removeprefix("http://")) == f"Bearer {hub.token}"
    assert list(sent.values()) == [None]
    output = capfd.readouterr()
    assert hub.token not in output.out + output.err
    for path in Path().rglob("*"):
        assert not path.is_file() or hub.token.encode() not in path.read_bytes()


def test_a_token_in_a_file_is_not_used(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(hub.token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    download(settings(), Path("models/source"))
    assert not [r for r in hub.requests if "authorization" in r.headers]


def test_a_missing_revision_is_named(hub: FakeHub) -> None:
    said = refusal(f"hf:{MODEL}@v9")
    assert "'v9'" in said
    assert MODEL in said


def test_a_missing_repository_is_named(hub: FakeHub) -> None:
    said = refusal("hf:acme/absent@main")
    assert "no model acme/absent" in said
    assert "HF_TOKEN is not set" in said


def test_a_repository_with_only_pickles_is_refused_before_anything_is_fetched(hub: FakeHub) -> None:
    repository = hub.repositories[MODEL]
    repository.files["pytorch_model.bin"] = repository.files.pop("model.safetensors")
    assert "pytorch_model.bin" in refusal()
    assert hub.asked("/resolve/") == []


def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(hub: FakeHub) -> None:
    hub.repositories[MODEL].files["config.json"] = b'{"model_type": "vit", "architectures": ["ViTModel"]}'
    assert "vit" in refusal()
    assert hub.asked("/cdn/") == []


def test_model_that_needs_custom_code_is_refused_before_the_code_is_fetched(hub: FakeHub) -> None:
    files = hub.repositories[MODEL].files
    config = {**json.loads(files["config.json"]), "model_type": "mine", "architectures": ["Mine"]}
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    files["config.json"] = json.dumps(config).encode()
    files["mine.py"] = b"raise SystemExit('the code ran')"
    assert "custom Python code (mine.Mine), which is never run" in refusal()
    assert hub.asked("mine.py") == []
    assert hub.asked("/cdn/") == []


def test_invalid_repository_name_is_refused(hub: FakeHub) -> None:
    assert "'acme/a..b' is not a valid repository name" in refusal("hf:acme/a..b@main")


def test_missing_hub_is_one_clear_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    said = refusal(transient=True)
    assert "cannot fetch" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("status", "transient", "remedy"),
    [(503, True, "run again later"), (429, True, "run again later"), (403, False, "HF_TOKEN"), (400, False, "address")],
)
def test_only_a_busy_hub_is_transient(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, status: int, transient: bool, remedy: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.status = status
    said = refusal(transient=transient)
    assert f"answered {status}" in said
    assert remedy in said


def test_one_file_of_a_data_set(hub: FakeHub, tmp_path: Path) -> None:
    fetched = fetch_file("hf:acme/questions@main/data/test.jsonl", None, tmp_path)
    assert fetched.file is not None
    assert fetched.file.read_bytes() == b'{"question": "why?"}\n'
    assert fetched.revision == hub.repositories[DATA].commit
    assert fetched.pin == hashlib.sha256(b'{"question": "why?"}\n').hexdigest()


def test_a_pinned_file_of_a_data_set_must_be_that_one(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=f"params.yaml expects {'0' * 64}"):
        fetch_file("hf:acme/questions@main/data/test.jsonl", "0" * 64, tmp_path)


def test_a_missing_file_of_a_data_set_is_named(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"data/train\.jsonl not found"):
        fetch_file("hf:acme/questions@main/data/train.jsonl", None, tmp_path)


class TestTheLibraryAlone:
    """Why tasks/sources/hub.py stores the bytes itself: `hf_hub_download` and `snapshot_download`, in the locked
    version, neither resume an earlier call nor verify checksums. If one of these tests fails, the library now does."""

    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("time.sleep", lambda _: None)

    def library(self, hub: FakeHub) -> Path:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            MODEL, revision="main", cache_dir="cache", endpoint=hub.endpoint, token=False, max_workers=1
        )
        return Path(found) / "model.safetensors"

    def test_abandoned_download_starts_from_scratch(self, hub: FakeHub, llama_files: dict[str, bytes]) -> None:
        breaks = [11 << 20, *[0] * 5]  # the number of tries in one call
        hub.break_after = [*breaks]
        with pytest.raises(httpx.RemoteProtocolError):
            self.library(hub)
        hub.requests.clear()
        assert self.library(hub).read_bytes() == llama_files["model.safetensors"]
        assert hub.ranges() == []

        hub.break_after = [*breaks]
        with pytest.raises(TransientError):
            download(settings(), Path("models/source"))
        hub.requests.clear()
        download(settings(), Path("models/source"))
        assert hub.ranges() == [f"bytes={10 << 20}-"]

    def test_wrong_bytes_are_accepted(self, hub: FakeHub) -> None:
        repository = hub.repositories[MODEL]
        content = repository.files["model.safetensors"]
        repository.wrong["model.safetensors"] = content[:-1] + bytes([content[-1] ^ 1])
        assert self.library(hub).read_bytes() == repository.wrong["model.safetensors"]
