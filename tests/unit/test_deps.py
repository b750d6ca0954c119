"""dvc.yaml lists exactly the code that each stage's program imports, which determines the effect of a change."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks import settings
from tools.deps import DEFINITION, ROOT, RULES, Code, DependencyError, Rules, rewritten

TEXT = (ROOT / DEFINITION).read_text(encoding="utf-8")
STAGES: Mapping[str, Any] = yaml.safe_load(TEXT)["stages"]
VARIANTS = ("base", "int8")
KINDS_OF_OUT = ("outs", "metrics")


@pytest.fixture(scope="module")
def code() -> Code:
    return Code()


def test_dvc_yaml_equals_the_generated_one(code: Code) -> None:
    new = rewritten(TEXT, code)
    generated = yaml.safe_load(new)["stages"]
    stale = [name for name in STAGES if STAGES[name] != generated[name]]
    assert not stale, f"{', '.join(stale)}: deps are not what the programs import; run make deps"
    assert new == TEXT, "the layout of dvc.yaml is not the generated one; run make deps"


def test_determinism_is_a_dependency_of_every_stage(code: Code) -> None:
    for name, stage in STAGES.items():
        listed = stage.get("do", stage)["deps"]
        assert "tasks/determinism.py" in listed, name
        assert not {code.file(module) for module in RULES.left_out} & set(listed), name
    for name in ("statistics", "quantize", "evaluate", "load"):
        assert "tasks/device.py" in STAGES[name].get("do", STAGES[name])["deps"], name


def test_every_import_by_a_computed_name_is_declared(code: Code) -> None:
    computed = {module for module in code.graph.modules if list(_computed_imports(code.tree(module)))}
    assert computed == set(RULES.dynamic), "correct `dynamic` in tools/deps.py"


def test_settings_contain_no_constants_of_methods(code: Code) -> None:
    """No stage depends on that module, so a change of a number there would not rerun any stage."""
    for module in sorted(code.graph.find_modules_that_directly_import("tasks.settings")):
        for node in ast.walk(code.tree(module)):
            if isinstance(node, ast.ImportFrom) and node.module == "tasks.settings":
                for name in node.names:
                    value = getattr(settings, name.name)
                    assert not isinstance(value, (int, float, dict)), f"{module}: {name.name} belongs where it is used"


def _computed_imports(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls that import or run a module whose name is not a string literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0] if node.args else None
            plain = isinstance(name, ast.Constant) and not str(name.value).startswith(".")
            if function in ("import_module", "__import__", "run_module", "run_path", "find_loader") and not plain:
                yield node


class TestExamples:
    """The stages that a change reruns if every rerun writes other bytes than before.

    quantize@base does not: it links the model's files. All variants share one list of deps, so a change in a solver
    reruns it, for a second, and DVC finds its output unchanged.
    """

    UNCHANGED = "quantize@base"

    @pytest.mark.parametrize(
        ("changed", "again", "never"),
        [
            pytest.param(
                "tasks/solvers/gptq.py",
                {"quantize@int8", "export@onnx-int8", "evaluate@onnx-int8", "load@onnx-int8", "report", "package@onnx"},
                {"download", "statistics", "export@onnx-base", "evaluate@onnx-base", "load@onnx-base"},
                id="a solver",
            ),
            pytest.param(
                "tasks/schemes.py",
                {"quantize@int8", "export@onnx-int8", "evaluate@onnx-int8", "load@onnx-int8", "report", "package@onnx"},
                {"download", "statistics", "export@onnx-base", "evaluate@onnx-base", "load@onnx-base"},
                id="a scheme",
            ),
            pytest.param(
                "tasks/runtimes/transformers.py",
                {
                    "evaluate@onnx-base",
                    "evaluate@onnx-int8",
                    "load@onnx-base",
                    "load@onnx-int8",
                    "report",
                    "package@onnx",
                },
                {"download", "datasets", "calibrate", "statistics"}
                | {f"quantize@{name}" for name in VARIANTS}
                | {f"export@onnx-{name}" for name in VARIANTS},
                id="a runtime",
            ),
            pytest.param(
                "tasks/formats/compressed_tensors.py",  # packed by quantize, read by all later stages
                {
                    "quantize@int8",
                    "export@onnx-int8",
                    "evaluate@onnx-int8",
                    "evaluate@onnx-base",
                    "load@onnx-int8",
                    "package@onnx",
                },
                {"download", "datasets", "calibrate", "statistics"},
                id="a format",
            ),
            pytest.param(
                "tasks/reporting/heat_map.py",
                {"report", "package@onnx"},
                {
                    *(f"quantize@{name}" for name in VARIANTS),
                    *(f"{kind}@onnx-{name}" for kind in ("export", "evaluate", "load") for name in VARIANTS),
                },
                id="a part of the report",
            ),
            pytest.param(
                "tasks/text/contamination.py",
                {"calibrate", "statistics", "quantize@int8", "export@onnx-int8", "evaluate@onnx-int8", "report"},
                {"download", "datasets", "export@onnx-base", "evaluate@onnx-base", "load@onnx-base"},
                id="the calibration text",
            ),
        ],
    )
    def test_a_change_reruns_its_dependents(self, changed: str, again: set[str], never: set[str]) -> None:
        assert (ROOT / changed).is_file()
        ran = self._runs_again(changed)
        assert ran >= again
        assert not ran & never

    def _runs_again(self, changed: str) -> set[str]:
        moved, ran = {changed}, set()
        for name, deps, outs in _expanded():  # in topological order
            if any(_touch(dep, path) for dep in deps for path in moved):
                ran.add(name)
                moved |= {out for out in outs if name != self.UNCHANGED}
        return ran


def _expanded() -> Iterator[tuple[str, list[str], list[str]]]:
    """Name, deps and outputs of every stage, with `foreach` and `matrix` unrolled for the target onnx."""
    for name, stage in STAGES.items():
        body = stage.get("do", stage)
        outs = [
            next(iter(out)) if isinstance(out, dict) else out for kind in KINDS_OF_OUT for out in body.get(kind, [])
        ]
        for of, words in _items(stage):
            deps, written = ([_filled(path, words) for path in paths] for paths in (body["deps"], outs))
            yield (f"{name}@{of}" if of else name), deps, written


def _items(stage: dict[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """The part of the name after @, and the value of each word, for every item of a stage."""
    if "matrix" in stage:
        yield from ((f"onnx-{name}", {"item.target": "onnx", "item.variant": name}) for name in VARIANTS)
    elif stage.get("foreach") == "${targets}":
        yield "onnx", {"item": "onnx"}
    else:
        yield from ((name, {"key": name}) for name in (VARIANTS if "foreach" in stage else ("",)))


def _filled(path: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        path = path.replace(f"${{{word}}}", value)
    return path


def _touch(one: str, other: str) -> bool:
    """Whether one path equals or is inside the other."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with every kind of import."""
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {
        "toyroom/__init__.py": "",
        "toyroom/program.py": """
            import toyroom.top
            from toyroom import sibling
            from toyroom.settings import VALUE
            from toyroom.start import run
            from typing import TYPE_CHECKING
            if TYPE_CHECKING:
                from toyroom import typing_only
            """,
        "toyroom/top.py": """
            import importlib
            def late():
                from toyroom.inner.deep import thing
                importlib.import_module("toyroom.by_name")
            """,
        "toyroom/inner/__init__.py": "import toyroom.of_a_package",
        "toyroom/inner/deep.py": "import toyroom.render",
        "toyroom/render.py": "",
        "toyroom/pages/page.txt": "",
        "toyroom/pages/filters.py": "import toyroom.of_a_folder",
        "toyroom/pages/__init__.py": "",
        "toyroom/sibling.py": """
            import subprocess, importlib
            subprocess.run(["python", "-m", "toyroom.started"])
            importlib.import_module(f"toyroom.kinds.{3}")
            """,
        "toyroom/kinds/__init__.py": "",
        "toyroom/kinds/one.py": "",
        "toyroom/settings.py": "import toyroom.behind_settings",
        "toyroom/start.py": "import toyroom.environment",
        **{f"toyroom/{name}.py": "" for name in ("typing_only", "unused", "by_name", "of_a_package", "of_a_folder")},
        **{f"toyroom/{name}.py": "" for name in ("started", "behind_settings", "environment")},
    }
    for path, text in files.items():
        _write(tmp_path / path, text)
    return tmp_path


TOY_RULES = Rules(
    packages=("toyroom",),
    left_out={"toyroom.settings": "values", "toyroom.start": "a start"},
    through={"toyroom.start": "an environment"},
    dynamic={"toyroom.sibling": "toyroom.kinds"},
    folders={"toyroom.render": "toyroom/pages"},
)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = text.strip("\n").splitlines()
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    path.write_text("\n".join(line[margin:] for line in lines) + "\n", encoding="utf-8")


class TestGenerator:
    def test_it_finds_every_kind_of_import(self, room: Path) -> None:
        names = (
            "__init__ by_name environment inner/__init__ inner/deep kinds/__init__ kinds/one of_a_folder of_a_package "
        )
        names += "render sibling started top"
        expected = sorted([*(f"toyroom/{name}.py" for name in names.split()), "toyroom/pages"])
        assert Code(room, TOY_RULES).deps("toyroom.program") == ["toyroom/program.py", *expected]

    def test_program_with_its_own_interpreter_adds_its_modules_and_lock(self, room: Path) -> None:
        _write(
            room / "toyroom/sibling.py",
            """
            from tasks.interpreter import Interpreter
            SERVER = Interpreter(entry="toyroom.server", lock="requirements-server.lock")
            """,
        )
        _write(room / "toyroom/server.py", "import toyroom.unused")
        rules = Rules(packages=("toyroom",))
        with pytest.raises(DependencyError, match=r"toyroom\.sibling needs requirements-server\.lock, which .* add it"):
            Code(room, rules).deps("toyroom.sibling")
        _write(room / "requirements-server.lock", "")
        assert Code(room, rules).deps("toyroom.sibling") == [
            *("toyroom/sibling.py", "requirements-server.lock", "toyroom/__init__.py"),
            *("toyroom/server.py", "toyroom/unused.py"),
        ]

    @pytest.mark.parametrize(
        ("declaration", "error"),
        [
            ('Interpreter(entry="toyroom.gone", lock="a.lock")', r"sibling declares the program toyroom\.gone"),
            ('Interpreter("toyroom.unused", "a.lock")', r"sibling:1 holds .*; expected entry and lock by name"),
        ],
    )
    def test_incomplete_declaration_is_refused(self, room: Path, declaration: str, error: str) -> None:
        _write(room / "toyroom/sibling.py", declaration)
        with pytest.raises(DependencyError, match=error):
            Code(room, Rules(packages=("toyroom",))).deps("toyroom.sibling")

    def test_rules_name_only_existing_modules(self, room: Path) -> None:
        with pytest.raises(DependencyError, match=r"names toyroom\.gone, which does not exist"):
            Code(room, Rules(packages=("toyroom",), left_out={"toyroom.gone": "a module that moved"}))

    def test_only_the_code_of_a_stage_is_replaced(self, room: Path) -> None:
        text = """\
# of the pipeline
stages:
  one:
    cmd: python -m toyroom.render NAME
    deps: [toyroom/gone.py, data/raw]
    outs: [a]

  many:
    foreach: ${variants}
    do:
      cmd: python -m toyroom.unused ${key}
      deps:
        - data/first  # the first
        - toyroom
        - old.lock
        - data/second  # the second
"""
        assert (
            rewritten(text, Code(room, TOY_RULES))
            == """\
# of the pipeline
stages:
  one:
    cmd: python -m toyroom.render NAME
    deps:
      - toyroom/render.py
      - toyroom/__init__.py
      - toyroom/of_a_folder.py
      - toyroom/pages
      - data/raw
    outs: [a]

  many:
    foreach: ${variants}
    do:
      cmd: python -m toyroom.unused ${key}
      deps:
        - toyroom/unused.py
        - toyroom/__init__.py
        - data/first  # the first
        - data/second  # the second
"""
        )

    def test_stage_without_a_module_is_refused(self, room: Path) -> None:
        code = Code(room, TOY_RULES)
        with pytest.raises(DependencyError, match=r"stage one runs 'sh run\.sh'; expected python -m MODULE"):
            rewritten("stages: {one: {cmd: sh run.sh}}", code)
        with pytest.raises(DependencyError, match=r"no module toyroom\.gone in .*; a stage's cmd is python -m MODULE"):
            rewritten("stages: {one: {cmd: python -m toyroom.gone}}", code)
