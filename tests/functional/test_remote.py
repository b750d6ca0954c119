"""Artifacts shared between checkouts of two machines through a DVC remote: a folder, or a bucket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional.toy import Toy

BUCKET = "s3://artifacts/modelpress"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a server with S3's API and one bucket; its credentials are in the environment."""
    pytest.importorskip("dvc_s3")
    import boto3
    from moto.server import ThreadedMotoServer

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="artifacts")
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def commit(toy: Toy) -> None:
    """Commit as in docs/operating.md: parameters, dvc.lock and metrics are in git."""
    toy.command("git", "add", "--force", ".dvc/config", "params.yaml", "dvc.lock", "metrics")
    toy.command("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "a run")


def clone(toy: Toy, root: Path, revision: str = "HEAD") -> Toy:
    """Another machine's checkout, with its own, empty cache."""
    toy.command("git", "clone", "--quiet", str(toy.root), str(root))
    other = Toy(root)
    other.command("git", "checkout", "--quiet", "--detach", revision)
    return other


def check_has_all_after_pull(other: Toy, like: Toy) -> None:
    """After the pull, neither DVC nor modelpress has anything to do, and the bytes are the same."""
    assert "8 stages: 8 unchanged" not in other.call("plan").stdout
    other.dvc("pull")
    assert "Running stage" not in other.dvc("repro")
    assert other.executed() == []
    done = other.call("plan")
    assert "8 stages: 8 unchanged" in done.stdout, done.stdout + done.stderr
    for path in ("models/int8/content.json", "report/transformers/summary.json"):
        assert other.read(path) == like.read(path)
    # its own copy, not a link into the other machine's
    assert not (other.root / "models/int8/content.json").samefile(like.root / "models/int8/content.json")


def test_a_folder_carries_artifacts_to_another_machine(toy: Toy, tmp_path: Path) -> None:
    toy.dvc("remote", "add", "--default", "share", str(tmp_path / "share"))
    commit(toy)
    toy.dvc("push")
    check_has_all_after_pull(clone(toy, tmp_path / "other"), toy)


def test_a_bucket_carries_artifacts_to_another_machine(toy: Toy, tmp_path: Path, bucket: str) -> None:
    toy.dvc("remote", "add", "--default", "share", BUCKET)
    toy.dvc("remote", "modify", "share", "endpointurl", bucket)
    commit(toy)
    toy.dvc("push")
    check_has_all_after_pull(clone(toy, tmp_path / "other"), toy)


@pytest.mark.slow
def test_a_deployed_run_pushes_where_there_is_a_default_remote(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.press import press

    monkeypatch.chdir(toy.root)
    # a remote relative to the checkout, configured only on this machine
    toy.dvc("remote", "add", "--local", "--default", "share", "../share")
    commit(toy)
    press.with_options(flow_run_name="otter")(gate_four_bit=0.85)
    assert (tmp_path / "share").is_dir()

    other = clone(toy, tmp_path / "other", "run/otter")
    other.dvc("remote", "add", "--local", "--default", "share", str(tmp_path / "share"))
    other.dvc("pull")
    assert "Running stage" not in other.dvc("repro")
    assert other.executed() == []


@pytest.mark.slow
def test_failed_push_is_logged_and_the_run_is_kept(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flows.press import press

    monkeypatch.chdir(toy.root)
    (tmp_path / "share").write_text("a file where the folder should be")
    toy.dvc("remote", "add", "--default", "share", str(tmp_path / "share"))
    commit(toy)
    press.with_options(flow_run_name="otter")(gate_four_bit=0.85)
    assert toy.command("git", "tag", "--list") == "run/otter\n"
    assert "not pushed to DVC's remote: " in caplog.text
    assert "`dvc push --all-tags` sends it" in caplog.text


def test_workspace_has_the_remote_and_its_local_settings(toy: Toy, tmp_path: Path) -> None:
    from flows.workspace.dvc_remote import share_dvc

    toy.dvc("remote", "add", "--default", "share", BUCKET)
    toy.dvc("remote", "add", "disk", "../disk")
    toy.dvc("remote", "modify", "--local", "share", "secret_access_key", "a=b, 'c'")
    toy.dvc("remote", "modify", "--local", "disk", "verify", "true")
    commit(toy)
    tree = toy.root / ".modelpress/runs/otter"
    toy.command("git", "worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
    share_dvc(toy.root, tree, toy.root / ".dvc/cache")
    assert (tree / ".dvc/config.local").stat().st_mode & 0o077 == 0
    code = "import json; from dvc.repo import Repo; print(json.dumps([Repo().config[k] for k in ('remote', 'cache')]))"
    remotes, cache = json.loads(Toy(tree).command("python", "-c", code))
    assert (remotes["share"]["url"], remotes["share"]["secret_access_key"]) == (BUCKET, "a=b, 'c'")
    assert (remotes["disk"]["url"], remotes["disk"]["verify"]) == (str(tmp_path / "disk"), True)
    assert cache["dir"] == str(toy.root / ".dvc/cache")
