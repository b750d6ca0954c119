"""Static checks of the image and the job templates."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import prefect.server.api
import pytest
from packaging.specifiers import SpecifierSet
from prefect.utilities.templating import apply_values, find_placeholders

PROJECT = Path(__file__).resolve().parents[2]
TYPES = ("docker", "kubernetes")
VOLUME = "/workspace"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of every line of the Dockerfile, with continued lines joined."""
    text = (PROJECT / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(word.upper(), " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in lines) if word]


def template(kind: str) -> dict[str, Any]:
    return dict(json.loads((PROJECT / f"deploy/{kind}.json").read_text(encoding="utf-8")))


def default_template(kind: str) -> dict[str, Any]:
    """Prefect's template for this type of work pool."""
    file = Path(prefect.server.api.__file__).parent / "collections_data/views/aggregate-worker-metadata.json"
    workers = json.loads(file.read_text(encoding="utf-8"))
    return dict(workers[f"prefect-{kind}"][kind]["default_base_job_configuration"])


def test_the_images_python_is_one_that_the_project_takes() -> None:
    (image,) = (rest for word, rest in instructions() if word == "FROM")
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", image)
    assert version, image
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert version[1] in SpecifierSet(project["requires-python"])


def test_what_the_image_makes_and_finds_is_what_the_makefile_makes() -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    found = instructions()
    made = [target for word, rest in found if word == "RUN" for target in re.findall(r"make (\w+) &&", rest)]
    assert made
    assert set(made) <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    home = next(rest for word, rest in found if word == "WORKDIR")
    (environment,) = re.findall(r"^VENV := (.+)$", makefile, re.MULTILINE)
    (path,) = re.findall(r"\bPATH=(\S+?):", " ".join(rest for word, rest in found if word == "ENV"))
    assert path == f"{home}/{environment}/bin"


def test_the_images_user_is_not_root_and_the_one_that_kubernetes_runs_it_as() -> None:
    found = instructions()
    made = re.search(r"useradd .*--uid (\d+) (\w+)", " ".join(rest for word, rest in found if word == "RUN"))
    assert made
    assert [rest for word, rest in found if word == "USER"] == [made[2]]
    job = template("kubernetes")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert job["securityContext"]["runAsUser"] == int(made[1]) != 0
    # that user owns the installed files and the volume, and starts there
    assert all(found.index(step) > found.index(("USER", made[2])) for step in found if step[1].startswith("make "))
    assert all(f"--chown={made[2]}:{made[2]}" in rest for word, rest in found if word == "COPY")
    assert any(re.search(rf"chown {made[2]}:{made[2]} .*{VOLUME}", rest) for word, rest in found if word == "RUN")
    assert found[-1] == ("WORKDIR", VOLUME)


def test_everything_in_the_image_comes_from_the_repository_and_the_locked_packages() -> None:
    found = instructions()
    assert not [rest for word, rest in found if word == "ADD"]
    assert not [rest for word, rest in found if word == "RUN" and re.search(r"curl|wget|https?:", rest)]
    for word, rest in found:
        if word == "COPY":
            *sources, _ = (part for part in rest.split() if not part.startswith("--"))
            assert sources
            assert not [source for source in sources if not (PROJECT / source).exists()]


def test_no_secret_gets_into_the_image() -> None:
    named = [rest for word, rest in instructions() if word in ("ENV", "ARG")]
    assert not re.search(r"token|secret|password|key", " ".join(named), re.IGNORECASE)
    ignored = (PROJECT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert {".git", ".dvc/config.local", ".env", ".netrc", ".aws", "mlflow.db", ".prefect"} <= set(ignored)
    # everything that the image needs is included
    copied = " ".join(rest for word, rest in instructions() if word == "COPY").split()
    assert not {part for part in copied if part != "."} & set(ignored)


@pytest.mark.parametrize("kind", TYPES)
def test_a_template_says_all_that_prefects_own_says(kind: str) -> None:
    ours, theirs = template(kind), default_template(kind)
    assert set(ours["job_configuration"]) == set(theirs["job_configuration"])
    # fixed, not a variable: no run may change it
    assert set(theirs["variables"]["properties"]) - set(ours["variables"]["properties"]) <= {"privileged"}


@pytest.mark.parametrize("kind", TYPES)
def test_every_variable_is_used_and_every_placeholder_is_a_variable(kind: str) -> None:
    found = template(kind)
    used = {place.name for place in find_placeholders(found["job_configuration"])}
    assert used == set(found["variables"]["properties"])


@pytest.mark.parametrize("kind", TYPES)
def test_a_run_gets_the_image_the_volume_and_no_privileges(kind: str) -> None:
    found = template(kind)
    properties = found["variables"]["properties"]
    defaults = {name: value["default"] for name, value in properties.items() if "default" in value}
    job = apply_values(found["job_configuration"], defaults)
    assert defaults["env"]["PYTHONPATH"] == VOLUME
    if kind == "docker":
        assert (job["image"], job["volumes"]) == ("modelpress:latest", [f"modelpress-workspace:{VOLUME}"])
        assert job["privileged"] is False
        return
    pod = job["job_manifest"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "modelpress:latest"
    assert container["workingDir"] == VOLUME
    assert container["volumeMounts"] == [{"name": "workspace", "mountPath": VOLUME}]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "modelpress-workspace"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["envFrom"] == [{"secretRef": {"name": "modelpress", "optional": True}}]


def test_the_form_shows_what_runs_are_given_so_no_secret_is_in_it() -> None:
    for kind in TYPES:
        defaults = [value.get("default") for value in template(kind)["variables"]["properties"].values()]
        assert not re.search(r"token|secret_|password|_key", json.dumps(defaults), re.IGNORECASE)
