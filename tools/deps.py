"""Write each stage's code dependencies to dvc.yaml, from the imports of its program (`make deps`).

python -m tools.deps

A stage's code is its program and all modules that it imports, directly or indirectly, at the top of a file or in a
function, with the `__init__.py` of their packages. `RULES` declares dependencies that imports do not show. A stage's
other deps, its data, are kept unchanged.
"""

from __future__ import annotations

import ast
import io
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grimp
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

ROOT = Path(__file__).resolve().parents[1]
DEFINITION = "dvc.yaml"


class DependencyError(Exception):
    """A dependency cannot be found. The message says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Rules:
    """Dependencies that imports do not show, and exceptions.

    packages: their modules are code of stages. left_out: module -> why no stage depends on it or on its imports.
    through: left-out modules whose imports still count, and why. dynamic: module -> the module or package (with all its
    modules) that it imports by a computed name. folders: module -> the folder, or the file, that it reads.
    """

    packages: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    through: Mapping[str, str] = field(default_factory=dict)
    dynamic: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)


RULES = Rules(
    packages=("tasks", "evals"),
    left_out={
        "tasks.settings": "it checks params.yaml; DVC compares the values as params. tasks.settings.variant is a dep",
        "tasks.environments": "it makes environments from lock files, which are deps themselves",
        "tasks.errors": "messages and exit statuses",
        "tasks.output": "it writes files atomically; their contents come from elsewhere",
        "tasks.hardware": "it describes the machine, in messages and records",
        "tasks.sources.known_types": "it refuses types of models before any work",
        "tasks.program": "it starts a stage and formats its errors",
    },
    through={"tasks.program": "it sets the environment that tasks.determinism describes"},
    folders={
        "tasks.deployment.groups": "tasks/deployment/lifeline.py",
        "tasks.serving.engines": "locks",
        "tasks.deployment.onnx": "tasks/serving/onnx_server",
        "tasks.deployment.tool_calling": "tasks/deployment/tables",
        "tasks.deployment.write": "tasks/deployment/templates",
        "tasks.reporting.render": "tasks/reporting/templates",
        "tasks.scoring.completions": "tasks/scoring/prompts.json",
        "tasks.scoring.eval_tasks": "evals",
    },
)


class Code:
    """The import graph of the packages of `rules` below the folder `root`, which must be on sys.path."""

    def __init__(self, root: Path = ROOT, rules: Rules = RULES) -> None:
        self.root = root
        self.rules = rules
        first, *others = rules.packages
        # code under `if TYPE_CHECKING` is not executed
        self.graph = grimp.build_graph(first, *others, exclude_type_checking_imports=True, cache_dir=None)
        self._trees: dict[str, ast.Module] = {}
        named = {*rules.left_out, *rules.through, *rules.dynamic, *rules.dynamic.values(), *rules.folders}
        if unknown := sorted(named - self.graph.modules):
            raise DependencyError(
                f"RULES names {', '.join(unknown)}, which does not exist; remove it or correct the name"
            )

    def deps(self, program: str) -> list[str]:
        """The files and folders of the code of the module `program`, relative to `root`: its own first, then sorted.

        DependencyError if there is no such module, or a file that one of its modules declares is missing.
        """
        if program not in self.graph.modules:
            raise DependencyError(f"no module {program} in {self.root}; a stage's cmd is python -m MODULE")
        modules = self._reached(program)
        folders = {self.rules.folders[module] for module in modules if module in self.rules.folders}
        files = {self.file(module) for module in modules - {*self.rules.left_out}}
        files = {file for file in files if not any(file.startswith(f"{folder}/") for folder in folders)}
        declared = {lock for module in modules for _, lock in self._interpreters(module)}
        declared = {lock for lock in declared if not any(lock.startswith(f"{folder}/") for folder in folders)}
        if missing := sorted(path for path in folders | declared if not (self.root / path).exists()):
            raise DependencyError(f"{program} needs {', '.join(missing)}, which {self.root} lacks; add it")
        own = self.file(program)
        return [own, *sorted((files | folders | declared) - {own})]

    def file(self, module: str) -> str:
        """The source file of a module, relative to `root`."""
        path = module.replace(".", "/")
        return f"{path}/__init__.py" if (self.root / path / "__init__.py").is_file() else f"{path}.py"

    def _reached(self, program: str) -> set[str]:
        """`program` and all modules that it runs, including left-out ones, but not their imports."""
        reached: set[str] = set()
        waiting = [program]
        while waiting:
            module = waiting.pop()
            if module not in reached:
                reached.add(module)
                waiting += self._next(module)
        return reached

    def _next(self, module: str) -> Iterator[str]:
        """The modules that `module` imports or starts."""
        if module in self.rules.left_out and module not in self.rules.through:
            return
        yield from self.graph.find_modules_directly_imported_by(module)
        if "." in module:
            yield module.rpartition(".")[0]
        if package := self.rules.dynamic.get(module):
            yield from (package, *self.graph.find_descendants(package))
        if folder := self.rules.folders.get(module):
            yield from (one for one in self.graph.modules if self.file(one).startswith(f"{folder}/"))
        yield from (entry for entry, _ in self._interpreters(module))
        # a module name in a string is imported or started: import_module("a.b"), python -m a.b
        texts = {node.value for node in ast.walk(self.tree(module)) if isinstance(node, ast.Constant)}
        yield from (text for text in texts if isinstance(text, str) and "." in text and text in self.graph.modules)

    def _interpreters(self, module: str) -> Iterator[tuple[str, str]]:
        """(entry module, lock file) of each `Interpreter(...)` in `module`; see tasks/interpreter.py."""
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Interpreter":
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                match given.get("entry"), given.get("lock"):
                    case ast.Constant(value=str(entry)), ast.Constant(value=str(lock)):
                        if entry not in self.graph.modules:
                            raise DependencyError(
                                f"{module} declares the program {entry}, which does not exist; add it"
                            )
                        yield entry, lock
                    case _:
                        raise DependencyError(
                            f"{module}:{node.lineno} holds {ast.unparse(node)}; expected entry and lock by name, "
                            "each as a string"
                        )

    def tree(self, module: str) -> ast.Module:
        """The parsed source of a module."""
        if module not in self._trees:
            self._trees[module] = ast.parse((self.root / self.file(module)).read_text(encoding="utf-8"))
        return self._trees[module]


def rewritten(text: str, code: Code) -> str:
    """Replace the code among the deps of every stage in dvc.yaml's `text`; keep comments, data and layout."""
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 10_000
    editor.indent(mapping=2, sequence=4, offset=2)
    document = editor.load(text)
    for name, stage in document["stages"].items():
        body = stage.get("do", stage)
        program = re.match(r"python -m ([\w.]+)", str(body["cmd"]))
        if program is None:
            raise DependencyError(f"stage {name} runs {body['cmd']!r}; expected python -m MODULE")
        body["deps"] = _replaced(body.get("deps", CommentedSeq()), code.deps(program[1]), code.rules.packages)
    out = io.StringIO()
    editor.dump(document, out)
    return out.getvalue()


def _replaced(deps: Any, code: list[str], packages: tuple[str, ...]) -> CommentedSeq:
    """A stage's `deps` with their code replaced by `code`; other deps keep their order and comments."""
    new = CommentedSeq(code)
    for index, path in enumerate(deps):
        if path.partition("/")[0] in packages or path.endswith(".lock") or path in code:
            continue
        new.append(path)
        if comment := deps.ca.items.get(index):
            new.ca.items[len(new) - 1] = comment
    return new


def main() -> None:
    """Rewrite dvc.yaml in the project's folder."""
    sys.path.insert(0, str(ROOT))
    path = ROOT / DEFINITION
    before = path.read_text(encoding="utf-8")
    try:
        after = rewritten(before, Code())
    except DependencyError as error:
        sys.exit(f"error: {error}")
    path.write_text(after, encoding="utf-8")
    print(f"{DEFINITION}: {'rewritten' if after != before else 'unchanged'}")


if __name__ == "__main__":
    main()
