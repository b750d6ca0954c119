"""The pages in docs/ agree with the code: examples run, commands and keys exist, quoted messages are real."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import yaml

from flows.cli import app
from tasks.exporters import Exporter
from tasks.formats import Format
from tasks.runtimes import Runtime
from tasks.settings import check_settings
from tests.tiny import tiny_model
from tools.site_links import DOCS, PAGES, ROOT, linked, repository_path, rewritten, site_path

PAGE_FILES = sorted((ROOT / DOCS).glob("*.md"))
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
EXTENDING = (ROOT / DOCS / "extending.md").read_text(encoding="utf-8")
_BLOCK = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """A fenced block of a page; title: its file name."""

    language: str
    title: str | None
    text: str


def sections() -> dict[str, list[Block]]:
    """The blocks of docs/extending.md by section heading."""
    found = {}
    for section in EXTENDING.split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        found[heading] = [Block(m["language"], m["title"], m["text"]) for m in _BLOCK.finditer(text)]
    return found


SECTIONS = sections()
EXAMPLE = "example"  # module name for the examples


@pytest.fixture(autouse=True)
def _example_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the module, because dataclasses look it up by name."""
    monkeypatch.setitem(sys.modules, EXAMPLE, ModuleType(EXAMPLE))


def run(blocks: list[Block], **given: Any) -> dict[str, Any]:
    """Write the titled data files below the current folder, then run the Python blocks in one namespace."""
    names: dict[str, Any] = {"__name__": EXAMPLE, **given}
    for block in blocks:
        if block.language == "python":
            exec(compile(block.text, block.title or DOCS, "exec", dont_inherit=True), names)
        elif block.title:
            path = Path(block.title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    return names


def check_implements(protocol: type, implementation: type) -> None:
    """Check that the implementation has all methods with the same parameters, and all properties."""
    for name, member in vars(protocol).items():
        if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        own = inspect.getattr_static(implementation, name)
        if inspect.isfunction(member):
            assert list(inspect.signature(own).parameters) == list(inspect.signature(member).parameters), name


def test_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme

    monkeypatch.chdir(tmp_path)
    scheme = run(SECTIONS["A scheme"])["W2A16"]
    weights = preset_name_to_scheme(scheme.name, ["Linear"]).weights
    assert weights is not None
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (2, 128, True)
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == (2, 128, True)


def test_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_implements(Format, run(SECTIONS["A format"])["Plain"])


def test_a_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(SECTIONS["A runtime"], model=tiny_model(tmp_path / "model"), params=ROOT / "params.yaml")
    check_implements(Runtime, names["UniformRuntime"])
    check_implements(Exporter, names["UniformExporter"])
    assert not set(Runtime.__annotations__) - set(dir(names["runtime"]))
    assert (tmp_path / "uniform.json").is_file()


def test_an_evaluation_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    run(sorted(SECTIONS["An evaluation task"], key=lambda block: block.language == "python"))
    (settings,) = (
        block.text for block in SECTIONS["An evaluation task"] if block.language == "yaml" and not block.title
    )
    changed = yaml.safe_load(settings)["evaluation"]
    check_settings({**PARAMS, "evaluation": {**PARAMS["evaluation"], **changed}})


def test_a_data_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run(SECTIONS["A data source"])
    first, second = capsys.readouterr().out.splitlines()
    assert "has no member 'other'; it has: news/data.jsonl" in first
    assert "params.yaml expects 0000" in second


def test_every_example_on_extending_is_run() -> None:
    assert set(SECTIONS) == {"A scheme", "A format", "A runtime", "An evaluation task", "A data source"}
    assert all(any(block.language == "python" for block in blocks) for blocks in SECTIONS.values())
    assert EXTENDING.count("```python") == sum(b.language == "python" for blocks in SECTIONS.values() for b in blocks)


def test_the_calibration_example_is_valid() -> None:
    page = (ROOT / DOCS / "own-model.md").read_text(encoding="utf-8")
    (block,) = (match for match in _BLOCK.finditer(page) if match["language"] == "yaml")
    check_settings(PARAMS | yaml.safe_load(block["text"]))


@pytest.mark.parametrize("page", PAGE_FILES, ids=lambda path: str(path.stem))
def test_commands_targets_and_keys_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(
        [*re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL), *re.findall(r"`([^`\n]+)`", text)]
    )
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) <= targets
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert set(re.findall(r"^modelpress ([a-z]+)", code, re.MULTILINE)) <= commands
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"modelpress\[(\w+)\]", code)) <= set(extras)
    for key in re.findall(r"--set '?~?([a-z0-9_.-]+)", code):
        place: Any = PARAMS
        for part in key.split("."):
            assert part in place, f"{page.name} sets {key}, which params.yaml lacks"
            place = place[part]


def texts() -> Iterator[str]:
    """All strings in the code and the text of the Makefile; … stands for values."""
    for folder in ("flows", "tasks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values).replace(
                        "`", ""
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value.replace("`", "")
    yield (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_message_on_troubleshooting_is_one_of_the_code() -> None:
    page = (ROOT / DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [row[1] for row in re.finditer(r"^\| `([^|]+)` \|", page, re.MULTILINE)]
    messages.append(re.findall(r"^`(.+?)` ends a run", page, re.MULTILINE)[0])
    assert len(messages) > 50
    known = list(texts())
    unknown = []
    for message in messages:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        if not any(pattern.search(text) for text in known):
            unknown.append(message)
    assert not unknown


def test_links_between_the_site_and_the_repository() -> None:
    assert repository_path("../params.yaml", "variants.md") == "params.yaml"
    assert repository_path("docs/plan.md", "changelog.md") == "docs/plan.md"
    assert repository_path("../../ARCHITECTURE.md", "api/index.md") == "ARCHITECTURE.md"
    assert [site_path(path) for path in ("docs/plan.md", "SECURITY.md", "dvc.yaml")] == [
        "plan.md",
        "security.md",
        "files/dvc.yaml",
    ]
    text = "[a](../params.yaml) [b](../ARCHITECTURE.md#the-stages) [c](../missing.md) [d](https://x.org/y) [e](#here)"
    assert rewritten(text, "variants.md") == (
        "[a](files/params.yaml) [b](architecture.md#the-stages) [c](../missing.md) [d](https://x.org/y) [e](#here)"
    )
    assert list(linked(text, "variants.md")) == ["params.yaml", "ARCHITECTURE.md"]
    assert all((ROOT / name).is_file() for name in PAGES)
