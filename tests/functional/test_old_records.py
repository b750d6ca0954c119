"""Records from before variants had a scheme: MLflow's runs, the registry, a champion and its tag.

Old and current flows write the same records except for the variants' settings. So the tests create old records by
running the current flows with an old params.yaml.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.graph.plan import read_plan
from flows.tracking.history import finished_runs
from flows.tracking.mlflow_run import recorded
from flows.tracking.registry import champion_tag, register
from tests.functional.toy import Toy

LOG = logging.getLogger("flows.test")
NAME = "smollm2-135m-instruct-transformers"
# from params.yaml of commit 7e53a78
OLD = {
    "variants": {
        "base": {"method": "none"},
        "int8": {
            "method": "int8",
            "backend": "modelpress",
            "smoothing": 0.5,
            "rounding": "gptq",
            "symmetric_activations": False,
        },
    },
    "onnx": {"output_layer": 8},
    "gguf": {"output_layer": 8},
}


def finish(toy: Toy, name: str) -> None:
    """The results of a deployed run: outputs, record, commit with a tag, version in the registry."""
    toy.dvc("repro")
    plan = read_plan(toy.root)
    with recorded(toy.root, toy.root, plan, LOG, {"name": name, "prefect.flow_run_id": name}) as record:
        record.complete(dict.fromkeys(plan, "executed"))
    toy.command("git", "add", "--all", "--force", "params.yaml", "dvc.lock", "metrics")
    commit(toy, name)
    toy.command("git", "tag", f"run/{name}")
    register(toy.root, toy.root, f"run/{name}", toy.command("git", "rev-parse", "HEAD").strip(), name, LOG)


def commit(toy: Toy, message: str) -> None:
    toy.command("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", message)


def write_params(toy: Toy, values: dict[str, Any]) -> None:
    toy.write("params.yaml", yaml.safe_dump(values, sort_keys=False))
    toy.command("git", "add", "params.yaml")
    commit(toy, "params.yaml")


@pytest.fixture(scope="module")
def old_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A toy after a run with the old settings, still in params.yaml; copy it, never change it."""
    toy = Toy.create(tmp_path_factory.mktemp("old") / "toy", packaging=True)
    write_params(toy, yaml.safe_load(toy.read("params.yaml")) | OLD)
    finish(toy, "old")
    return toy


@pytest.fixture
def here(old_toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = old_toy.copy(tmp_path / "toy")
    monkeypatch.chdir(toy.root)
    return toy


def test_what_is_kept_is_in_old_words(here: Toy) -> None:
    """A precondition of the other tests."""
    child = next(run for run in here.mlflow_runs(parents=False) if run.info.run_name == "transformers-int8")
    assert (child.data.params["method"], "scheme" in child.data.params) == ("int8", False)
    kept = yaml.safe_load(here.command("git", "show", "run/old:params.yaml"))
    assert kept["variants"] == OLD["variants"]
    assert kept["onnx"] == OLD["onnx"]


def test_the_history_shows_an_old_run_in_new_words(here: Toy) -> None:
    (run,) = finished_runs(here.root)
    assert (run.name, run.tag, run.winner, run.scheme) == ("old", "run/old", "int8", "W8A8")
    assert (run.size_bytes, run.retention, run.champion_of) == (167_000_000, (0.97, 0.95, 0.99), NAME)
    assert run.perplexities == {"news": 12.345}


def test_what_was_made_is_shown_and_fetched_before_params_yaml_is_rewritten(here: Toy, tmp_path: Path) -> None:
    for what in ("champion", "run/old"):
        target = tmp_path / what.replace("/", "-")
        done = here.call("get", what, "--to", str(target))
        assert done.returncode == 0, done.stderr
        variants, _ = json.loads((target / "content.json").read_text())
        assert variants == OLD["variants"]
    assert "run/old" in here.call("runs").stdout
    done = here.call("report")
    assert done.stdout.startswith("the table of the field\n")
    assert (done.returncode, f"dist/{NAME}" in done.stdout) == (0, True)


def test_a_run_is_refused_with_the_new_words_for_each_old_one(here: Toy) -> None:
    done = here.call("run")
    assert (done.returncode, done.stdout) == (1, "")
    first, *lines = done.stderr.splitlines()
    assert first.endswith("params.yaml uses settings of an earlier version; replace them with:")
    base, int8, onnx, gguf = (line.strip() for line in lines)
    assert base == "variants.base: {scheme: none}"
    assert yaml.safe_load(int8.removeprefix("variants.int8: ")) == {
        "scheme": "W8A8",
        "scaling": "smoothquant",
        "smoothing": 0.5,
        "rounding": "gptq",
        "symmetric_activations": False,
    }
    assert onnx.startswith("onnx: remove the section; output_layer is now a setting of each variant")
    assert gguf.startswith("gguf: remove the section; output_layer is now a setting of each variant")


@pytest.mark.parametrize(("smoothing", "better"), [(0.4, False), (0.95, True)])
def test_an_old_champion_is_compared_with_a_new_package(
    here: Toy, smoothing: float, better: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    values = {key: value for key, value in yaml.safe_load(here.read("params.yaml")).items() if key not in OLD}
    int8 = {"scheme": "W8A8", "scaling": "smoothquant", "smoothing": smoothing, "rounding": "gptq"}
    write_params(here, values | {"variants": {"base": {"scheme": "none"}, "int8": int8}})
    finish(here, "new")
    assert champion_tag(here.root, NAME) == ("run/new" if better else "run/old")
    loses = "the new package: it is not certain to be as good: of the champion's"
    told = "version 2 is now the champion" if better else loses
    assert told in caplog.text
    assert [(run.tag, run.scheme) for run in finished_runs(here.root)] == [("run/new", "W8A8"), ("run/old", "W8A8")]
