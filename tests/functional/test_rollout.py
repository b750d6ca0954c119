"""`modelpress deploy` with real git and DVC: versions, a canary, and the way back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tasks.bundle.checksums import write_sums
from tasks.deployment.write import write_serving
from tasks.output import checksums
from tasks.settings import check_settings
from tests.functional.toy import PROJECT, Toy
from tests.unit.test_sizing import LARGE

DVC_YAML = """
stages:
  package:
    cmd: mkdir -p dist && cp -r made dist/${package.name}-transformers
    deps: [made]
    params: [package.name]
    outs: ["dist/${package.name}-transformers"]
"""
NAME = "smollm2-135m-instruct"
IMAGES = ("--image", "vllm=vllm@sha256:" + "0" * 64, "--image", "caddy=caddy@sha256:" + "1" * 64)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Two finished runs, `a` and `b`, whose packages are small bundles. Read only."""
    toy = Toy.create(tmp_path_factory.mktemp("runs") / "toy")
    toy.write("dvc.yaml", DVC_YAML)
    for day, name in enumerate("ab", start=1):
        made = toy.root / "made"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        (made / "weights.safetensors").write_text(f"the numbers of {name}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tasks.deployment.write.read_shape", lambda _: LARGE)
            params = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
            write_serving(made, check_settings(params), "vllm", "awq-int4")
        write_sums(made)
        toy.dvc("repro")
        toy.command("git", "add", "--all")
        date = f"GIT_COMMITTER_DATE=2026-01-0{day}T00:00:00Z"  # finished runs are listed by date
        author = ("-c", "user.name=t", "-c", "user.email=t@t")
        toy.command("env", date, "git", *author, "commit", "--quiet", "--message", name)
        toy.command("git", "tag", f"run/{name}")
    return toy


@pytest.fixture
def live(tmp_path: Path) -> Path:
    return tmp_path / "live"


def deployed(runs: Toy, live: Path, *arguments: str) -> str:
    done = runs.call("deploy", *arguments, "--to", str(live))
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(runs: Toy, live: Path, *arguments: str) -> str:
    """The error's one line; the folder does not change."""
    before = checksums(live)
    done = runs.call("deploy", *arguments, "--to", str(live))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert checksums(live) == before
    return done.stderr.removeprefix("error: ").rstrip()


def weights(live: Path) -> dict[str, int]:
    versions = json.loads((live / "deployment.json").read_text())["versions"]
    return {version["run"]: version["weight"] for version in versions}


def test_two_versions_a_canary_and_the_way_back(runs: Toy, live: Path) -> None:
    said = deployed(runs, live, "run/a", *IMAGES)
    assert said.splitlines() == [
        "requests run/a 100%",
        f"next     cd {live} && docker compose up --detach --wait --remove-orphans",
    ]
    first = checksums(live)
    assert (live / "versions/a/weights.safetensors").read_text() == "the numbers of a"
    deployed(runs, live, "run/a", *IMAGES)
    assert checksums(live) == first

    said = deployed(runs, live, "b", "--canary", "10")  # with the images of before
    assert said.splitlines()[0] == "requests run/a 90%, run/b 10%"
    assert said.splitlines()[-1] == f"undo     modelpress deploy --back --to {live}    # run/a"
    assert weights(live) == {"run/a": 90, "run/b": 10}
    assert "lb_policy weighted_round_robin 9 1" in (live / "Caddyfile").read_text()
    tried = checksums(live)
    deployed(runs, live, "run/b", "--canary", "10")
    assert checksums(live) == tried

    deployed(runs, live, "run/b")
    assert weights(live) == {"run/b": 100}
    deployed(runs, live, "--back")
    assert weights(live) == {"run/a": 100}
    after = checksums(live)
    assert all(after[name] == digest for name, digest in first.items() if name != "deployment.json")
    assert refused(runs, live, "--back") == (
        "there is no version before run/a to go back to; name one: modelpress deploy run/NAME"
    )


def test_manifests_for_kubernetes(runs: Toy, live: Path) -> None:
    live.mkdir()
    assert refused(runs, live, "run/a", "--kubernetes", *IMAGES).startswith("a route needs a Gateway and a host name")
    place = ("--kubernetes", "--gateway", "infra/public", "--hostname", "models.example.org")
    deployed(runs, live, "run/a", *place, *IMAGES)
    said = deployed(runs, live, "run/b", "--kubernetes", "--canary", "25")
    files = live / "kubernetes"
    assert said.splitlines()[1:4] == [
        f"next     kubectl apply --recursive --filename {files}/a --filename {files}/b"
        "    # beside the other version: as many free GPUs, or as much memory, again",
        f"then     kubectl rollout status deployment/{NAME}-b",
        f"then     kubectl apply --filename {files}/route.yaml",
    ]
    route, _ = yaml.safe_load_all((live / "kubernetes/route.yaml").read_text())
    assert [(one["name"], one["weight"]) for one in route["spec"]["rules"][0]["backendRefs"]] == [
        (f"{NAME}-a", 75),
        (f"{NAME}-b", 25),
    ]
    assert refused(runs, live, "run/b") == f"{live} is for kubernetes, not compose; name another folder with --to"
    said = deployed(runs, live, "--back")
    assert f"kubectl delete --recursive --filename {live}/retired" in said
    assert [path.name for path in (live / "retired").iterdir()] == ["b"]


def test_what_is_wrong_is_one_line(runs: Toy, live: Path) -> None:
    live.mkdir()
    assert refused(runs, live) == "name either a version, run/NAME or champion, or --back"
    assert refused(runs, live, "run/a", "--back") == "name either a version, run/NAME or champion, or --back"
    assert refused(runs, live, "--back").startswith(f"{live} has no deployment to go back in")
    assert refused(runs, live, "--back", "--canary", "5").startswith("--back takes no --image and no --canary")
    assert refused(runs, live, "run/zoo") == "no finished run run/zoo; finished runs: run/b, run/a"
    for share in ("0", "100", "250"):
        words = f"--canary is {share}, expected a share of the requests from 1 to 99 percent"
        assert refused(runs, live, "run/a", "--canary", share) == words
    assert refused(runs, live, "run/a", "--canary", "10").startswith(f"nothing is deployed in {live} yet")
    assert refused(runs, live, "run/a", "--gateway", "x").startswith("--gateway and --hostname are for Kubernetes")
    deployed(runs, live, "run/a", *IMAGES)
    assert refused(runs, live, "run/a", "--canary", "10").startswith("run/a is the version that has the other requests")
    assert refused(runs, live, "run/b", "--image", "vllm=vllm:latest").startswith("--image vllm=vllm:latest: expe")
    (live / "versions/a/weights.safetensors").chmod(0o644)
    (live / "versions/a/weights.safetensors").unlink()
    (live / "versions/a/weights.safetensors").write_text("other numbers")
    assert "weights.safetensors was changed" in refused(runs, live, "run/a", *IMAGES)


def test_another_folder_is_left_alone(runs: Toy, live: Path) -> None:
    live.mkdir()
    (live / "thesis.tex").write_text("chapter one")
    assert refused(runs, live, "run/a", *IMAGES) == (
        f"{live} holds thesis.tex and no deployment.json, so it is no deployment; name another folder with --to"
    )


def test_images_are_asked_for(runs: Toy, live: Path) -> None:
    done = runs.call("deploy", "run/a", "--to", str(live))
    assert done.stderr == "error: no image for caddy; name it by digest: --image caddy=IMAGE@sha256:...\n"
    assert not (live / "deployment.json").exists()
    deployed(runs, live, "run/a", *IMAGES)  # the bundle is there already
