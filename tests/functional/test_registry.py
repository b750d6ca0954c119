"""MLflow's registry: packages, their champion, and the history of the runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.tracking.history import finished_runs
from tests.functional.test_press import press
from tests.functional.toy import Toy

NAME = "smollm2-135m-instruct-transformers"


@pytest.fixture(scope="module")
def champion_toy(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A toy after its first deployed run; copy it, never change it."""
    toy = Toy.create(tmp_path_factory.mktemp("champion") / "toy", packaging=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(toy.root)
        press("first", variants=["int8"])
    return toy


@pytest.fixture
def here(champion_toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = champion_toy.copy(tmp_path / "toy")
    monkeypatch.chdir(toy.root)
    return toy


def client(toy: Toy) -> MlflowClient:
    return MlflowClient(f"sqlite:///{toy.root / 'mlflow.db'}")


def versions(toy: Toy) -> dict[int, str]:
    """The git tag of each version."""
    return {int(v.version): v.tags["git.tag"] for v in client(toy).search_model_versions(f"name = '{NAME}'")}


def champion(toy: Toy) -> str:
    return str(client(toy).get_model_version_by_alias(NAME, "champion").tags["git.tag"])


def variant(name: str, **values: Any) -> None:
    press(name, variants=["int8"], changes_to_params=[f"variants.int8.{key}={value}" for key, value in values.items()])


def test_the_first_package_is_registered_as_a_pointer_and_is_the_champion(here: Toy) -> None:
    version = client(here).get_model_version_by_alias(NAME, "champion")
    tags = version.tags
    assert (tags["git.tag"], tags["variant"], tags["dvc.path"]) == ("run/first", "int8", f"dist/{NAME}")
    assert tags["git.commit"] == here.command("git", "rev-parse", "run/first").strip()
    lock = here.command("git", "show", "run/first:dvc.lock")
    assert f"md5: {tags['dvc.md5']}" in lock
    assert tags["retention.low"] == "0.95"
    (run,) = here.mlflow_runs()
    assert version.run_id == run.info.run_id
    assert run.data.tags["git.tag"] == "run/first"
    assert version.source is not None
    model = client(here).get_logged_model(version.source.removeprefix("models:/"))
    assert model.tags["dvc.md5"] == tags["dvc.md5"]


@pytest.mark.slow
def test_alias_moves_only_to_a_better_version(here: Toy, caplog: pytest.LogCaptureFixture) -> None:
    variant("worse", smoothing=0.4)
    assert champion(here) == "run/first"
    assert "version 1 (run/first) stays the champion; the new package: it is not certain to be as good" in caplog.text

    press("other", variants=["int8"], limit=100, changes_to_params=["variants.int8.smoothing=0.95"])
    assert champion(here) == "run/first"
    assert "limit was 250 for the champion and is 100 now" in caplog.text

    variant("better", smoothing=0.95)
    assert champion(here) == "run/better"
    assert "version 4 is now the champion" in caplog.text

    assert versions(here) == {1: "run/first", 2: "run/worse", 3: "run/other", 4: "run/better"}
    marks = {run.tag: run.champion_of for run in finished_runs(here.root)}
    assert marks == {"run/better": NAME, "run/other": None, "run/worse": None, "run/first": None}
    assert next(iter(marks)) == "run/better"  # newest first


@pytest.mark.slow
def test_the_same_package_makes_no_second_version(here: Toy, caplog: pytest.LogCaptureFixture) -> None:
    press("again", variants=["int8"])
    assert versions(here) == {1: "run/first"}
    assert f"the same package is already version 1 of {NAME}" in caplog.text
    assert champion(here) == "run/first"


@pytest.mark.slow
def test_missing_champion_keeps_its_alias_and_does_not_fail_the_run(
    here: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    here.command("git", "tag", "--delete", "run/first")
    variant("better", smoothing=0.95)
    assert champion(here) == "run/first"
    assert (
        "the two cannot be compared: git show run/first:metrics/evaluate/transformers/int8.json failed" in caplog.text
    )


@pytest.mark.slow
def test_unreachable_store_skips_registration_but_not_the_run(
    here: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    variant("better", smoothing=0.95)
    assert "run/better" in here.command("git", "tag", "--list")
    assert "the run is kept as run/better, but its package is not registered" in caplog.text
    for words in (["get", "champion"], ["history"]):
        done = here.call(*words)
        assert done.returncode == 1
        assert done.stderr.startswith("error: MLflow at http://127.0.0.1:9 does not work (")


def test_the_champion_is_fetched_by_its_name(here: Toy, tmp_path: Path) -> None:
    done = here.cli("get", "champion", "--to", str(tmp_path / "bundle"))
    assert done.returncode == 0, done.stderr
    variants, _ = json.loads((tmp_path / "bundle/content.json").read_text())
    assert list(variants) == ["base", "int8"]

    here.set(package__name="another-name")
    done = here.call("get", "champion", "--to", str(tmp_path / "other"))
    assert (done.returncode, done.stderr) == (
        1,
        "error: no champion of another-name-transformers yet; a deployed run makes one: `modelpress serve`\n",
    )
    with pytest.raises(MlflowException):
        client(here).get_registered_model("another-name-transformers")  # the lookup did not create it


def test_the_history_compares_finished_runs(here: Toy) -> None:
    heading, row = here.call("history").stdout.splitlines()
    assert heading.split()[:7] == ["date", "run", "tag", "target", "winner", "scheme", "size"]
    assert row.split()[2:] == [
        "first",
        "run/first",
        "transformers",
        "int8",
        "W8A8",
        "167",
        "MB",
        "97.0",
        "(95.0",
        "to",
        "99.0)",
        "news",
        "12.35",
        "champion",
        "of",
        NAME,
    ]
    (here.root / "mlflow.db").unlink()
    assert here.call("history").stdout == "no finished runs yet; start one with `modelpress run`\n"
    assert not (here.root / "mlflow.db").exists()
