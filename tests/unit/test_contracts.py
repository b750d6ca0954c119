"""Files that must agree: params.yaml, dvc.yaml, the settings, pyproject.toml, the lock, Makefile and README."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from setuptools import find_packages

from tasks.environments import locked
from tasks.quantizers.identity import LIBRARIES
from tasks.scoring.eval_tasks import local_tasks
from tasks.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()


def body(stage: dict[str, Any]) -> dict[str, Any]:
    return dict(stage.get("do", stage))


def paths(values: list[Any]) -> Iterator[str]:
    for value in values:
        yield value if isinstance(value, str) else next(iter(value))


def test_params_yaml_is_valid() -> None:
    settings = load_settings(ROOT / "params.yaml")
    assert {v.scheme for v in settings.variants.values()} == {"none", "W8A8", "W4A16_ASYM", "mixed"}
    assert {v.scaling for v in settings.variants.values()} == {"none", "smoothquant", "awq"}


def test_every_required_setting_is_in_params_yaml_with_a_value() -> None:
    def missing(model: type[BaseModel], values: dict[str, Any]) -> Iterator[str]:
        for name, field in model.model_fields.items():
            if name not in values:
                yield name
            elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from missing(field.annotation, values[name])

    assert not list(missing(Settings, PARAMS))


def test_every_section_is_a_parameter_of_some_stage_and_every_parameter_exists() -> None:
    used = set()
    for stage in STAGES.values():
        for name in paths(body(stage).get("params", [])):
            if name == "pyproject.toml":
                continue
            used.add(name.split(".")[0])
            place: Any = PARAMS
            for key in name.partition(".$")[0].split("."):
                assert key in place, f"dvc.yaml names {name}, which params.yaml lacks"
                place = place[key]
    assert used == set(PARAMS)


def test_the_versions_that_stages_depend_on_are_the_pinned_ones() -> None:
    pins = {re.split(r"[<>=]", one)[0] for one in PROJECT["optional-dependencies"]["tasks"] if "==" in one}
    assert {library for names in LIBRARIES.values() for library in names} <= pins | set(locked("llama-cpp"))
    for name in ("quantize", "export", "evaluate", "load"):
        (named,) = (one["pyproject.toml"] for one in body(STAGES[name])["params"] if isinstance(one, dict))
        assert "project.optional-dependencies.tasks" in named
        assert {"locks", "locks/llama-cpp.lock"} & set(body(STAGES[name])["deps"])


def test_every_package_is_installed_with_its_data() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = find_packages(str(ROOT), include=setuptools["packages"]["find"]["include"])
    folders = {path.parent for top in ("flows", "tasks", "evals") for path in (ROOT / top).rglob("__init__.py")}
    assert sorted(found) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    data = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    beside = {path for path in (ROOT / "tasks").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data == beside


def test_the_lock_holds_every_direct_dependency_at_an_exact_version() -> None:
    lock = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    lock = {name.lower().replace("_", "-").replace(".", "-"): version for name, version in lock.items()}
    for requirement in [
        *PROJECT["dependencies"],
        # Ray and llama.cpp are optional
        *(r for name, extra in PROJECT["optional-dependencies"].items() if name not in ("ray", "gguf") for r in extra),
    ]:
        name, *pin = requirement.split("==")
        key = re.split(r"[<>=\[]", name)[0].lower().replace(".", "-")
        assert key in lock, f"{key} is not locked; run: make lock"
        assert not pin or lock[key] == pin[0], f"{key} is locked at another version; run: make lock"
    minor = {name: tuple(map(int, lock[name].split(".")[:2])) for name in ("fastapi", "sqlalchemy")}
    assert minor["fastapi"] < (0, 151)
    assert minor["sqlalchemy"] < (2, 1)


@pytest.mark.parametrize(("package", "column"), [("flows", 1), ("tasks", 3)])
def test_the_drawing_of_the_architecture_shows_the_layers_that_imports_are_held_to(package: str, column: int) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (one["layers"] for one in contracts if one.get("containers") == [package])
    level = {name: number for number, layer in enumerate(layers) for name in layer.split(" | ")}
    lines = [line.split("│")[column] for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines() if "│" in line]
    drawn = [name.rstrip("/") for line in lines for name in line.partition("·")[0].split()]
    assert sorted(drawn) == sorted(level)
    assert [level[name] for name in drawn] == sorted(level.values())


def test_every_stage_has_a_program() -> None:
    for name, stage in STAGES.items():
        assert (ROOT / f"tasks/{name}.py").is_file()
        assert body(stage)["cmd"].startswith(f"python -m tasks.{name}")


def test_every_local_task_reads_a_data_set_of_params_yaml() -> None:
    for task in local_tasks(ROOT / "evals"):
        definition = re.search(r"data/raw/([a-z0-9-]+)/data", (ROOT / f"evals/{task}.yaml").read_text())
        assert definition
        assert definition.group(1) in PARAMS["evaluation"]["sources"]
    assert set(PARAMS["evaluation"]["tasks"]) <= set(local_tasks(ROOT / "evals"))


def test_the_readme_names_what_there_is() -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", README))
    assert {"demo", "test"} <= named <= targets
    from flows.cli import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert set(re.findall(r"^modelpress ([a-z]+)", README, re.MULTILINE)) == commands
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for key in re.findall(r"--set '?~?([a-z0-9_.-]+)", README):
        place: Any = PARAMS
        for part in key.split("."):
            assert part in place, f"README sets {key}, which params.yaml lacks"
            place = place[part]


def test_ci_calls_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text()
    for target in ("lint", "types", "docs", "test"):
        assert f"make {target}" in script
        assert f"make {target}" in README
